//! Owns the limits of the kernel's control groups. It reads the group of this process and all groups above it, such
//! as a container, its pod or a slice of systemd, and returns their limits of CPU and memory. The smallest limit
//! applies.
//!
//! The files are described in <https://docs.kernel.org/admin-guide/cgroup-v2.html> and, for version 1, in
//! `cgroup-v1/memory.html` and `scheduler/sched-bwc.html` beside it.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

/// The number of bytes from which a limit of version 1 means "no limit".
const NO_LIMIT: u64 = 1 << 60;

/// The groups of a process, in the hierarchies that limit memory and the CPU.
#[derive(Debug, Default)]
pub struct Cgroups {
    /// The directories of the groups, from the group of the process up to the highest visible one.
    unified: Vec<PathBuf>,
    memory: Vec<PathBuf>,
    cpu: Vec<PathBuf>,
}

/// A memory limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The maximum of the group, in bytes.
    pub limit: u64,
    /// The memory that the group uses, in bytes, without the file cache, which the kernel reclaims when programs need
    /// memory.
    pub used: u64,
}

impl Cgroups {
    /// Returns the groups of this process, or no groups if the kernel shows none.
    pub fn of_this_process() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self::parse(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"))
    }

    /// Parses the contents of `/proc/self/cgroup` and `/proc/self/mountinfo`.
    fn parse(groups: &str, mounts: &str) -> Self {
        let mut found = Self::default();
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            let controllers: Vec<&str> = controllers.split(',').collect();
            let directories = |kind| mounts.lines().find_map(|mount| above(mount, kind, path));
            if controllers == [""] {
                found.unified = directories(Kind::Unified).unwrap_or_default();
            } else if controllers.contains(&"memory") {
                found.memory = directories(Kind::Of("memory")).unwrap_or_default();
            }
            if controllers.contains(&"cpu") {
                found.cpu = directories(Kind::Of("cpu")).unwrap_or_default();
            }
        }
        found
    }

    /// Returns the cores whose time the process may use, usually a fraction, or `None` without a limit.
    pub fn cpu_quota(&self) -> Option<f64> {
        let unified = self.unified.iter().filter_map(|group| {
            let text = fs::read_to_string(group.join("cpu.max")).ok()?;
            let (quota, period) = text.trim().split_once(' ')?;
            cores(quota.parse().ok()?, period.parse().ok()?)
        });
        let first = self.cpu.iter().filter_map(|group| {
            cores(number(&group.join("cpu.cfs_quota_us"))?, number(&group.join("cpu.cfs_period_us"))?)
        });
        unified.chain(first).min_by(f64::total_cmp)
    }

    /// Returns the memory limits, each with the memory that counts against it.
    pub fn memory(&self) -> Vec<Memory> {
        let unified = self.unified.iter().filter_map(|group| {
            let cache = ["inactive_file", "active_file"];
            memory(group, "memory.max", "memory.current", cache)
        });
        let first = self.memory.iter().filter_map(|group| {
            let cache = ["total_inactive_file", "total_active_file"];
            memory(group, "memory.limit_in_bytes", "memory.usage_in_bytes", cache)
        });
        unified.chain(first).collect()
    }
}

fn memory(group: &Path, limit: &str, usage: &str, cache: [&str; 2]) -> Option<Memory> {
    // Without a limit, the file contains `max` or a number larger than any memory.
    let limit = number(&group.join(limit)).filter(|limit| *limit < NO_LIMIT)?;
    let usage: u64 = number(&group.join(usage)).unwrap_or(0);
    let statistics = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cached: u64 = statistics
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| cache.contains(name))
        .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
        .sum();
    Some(Memory { limit, used: usage.saturating_sub(cached) })
}

/// Returns the cores of a group with `quota` microseconds of time in each `period`, or `None` without a quota.
fn cores(quota: i64, period: i64) -> Option<f64> {
    (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
}

fn number<N: FromStr>(path: &Path) -> Option<N> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A kind of hierarchy.
#[derive(Clone, Copy)]
enum Kind {
    /// The hierarchy of version 2.
    Unified,
    /// The hierarchy of a controller of version 1.
    Of(&'static str),
}

/// Returns the directories of the group `path` and of the groups above it, if the line of the mounts belongs to a
/// hierarchy of this kind.
fn above(mount: &str, kind: Kind, path: &str) -> Option<Vec<PathBuf>> {
    let (place, system) = mount.split_once(" - ")?;
    let mut place = place.split(' ').skip(3);
    let (root, top) = (place.next()?, Path::new(place.next()?));
    let mut system = system.split(' ');
    let (name, options) = (system.next()?, system.nth(1)?);
    let is_meant = match kind {
        Kind::Unified => name == "cgroup2",
        Kind::Of(controller) => name == "cgroup" && options.split(',').any(|option| option == controller),
    };
    if !is_meant {
        return None;
    }
    // The mount may start at a group below the root. The groups above that group are not visible.
    let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
    let names = below.components().filter(|part| matches!(part, Component::Normal(_)));
    let own = names.fold(top.to_owned(), |path, name| path.join(name));
    Some(own.ancestors().take_while(|group| group.starts_with(top)).map(Path::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hierarchy in a directory: files by path.
    fn hierarchy(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        dir
    }

    fn mount(root: &str, dir: &Path, system: &str) -> String {
        format!("31 23 0:28 {root} {} rw,relatime shared:9 - {system}\n", dir.display())
    }

    #[test]
    fn the_least_limit_of_all_groups_above_counts() {
        let dir = hierarchy(&[
            ("pod/cpu.max", "50000 100000\n"),
            ("pod/memory.max", "1000000\n"),
            ("pod/memory.current", "400000\n"),
            ("pod/memory.stat", "anon 1\ninactive_file 100000\nactive_file 50000\n"),
            ("pod/app/cpu.max", "max 100000\n"),
            ("pod/app/memory.max", "max\n"),
        ]);
        let groups = Cgroups::parse("0::/pod/app\n", &mount("/", dir.path(), "cgroup2 cgroup2 rw"));
        assert_eq!(groups.cpu_quota(), Some(0.5));
        assert_eq!(groups.memory(), [Memory { limit: 1_000_000, used: 250_000 }]);
        // Its own limit is less than that of the group above.
        fs::write(dir.path().join("pod/app/cpu.max"), "25000 100000").unwrap();
        fs::write(dir.path().join("pod/app/memory.max"), "500").unwrap();
        assert_eq!(groups.cpu_quota(), Some(0.25));
        assert_eq!(groups.memory()[0], Memory { limit: 500, used: 0 });
    }

    #[test]
    fn limits_of_the_first_version_count_too() {
        let dir = hierarchy(&[
            ("memory/docker/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/docker/c1/memory.limit_in_bytes", "2000\n"),
            ("memory/docker/c1/memory.usage_in_bytes", "700\n"),
            ("memory/docker/c1/memory.stat", "inactive_file 1\ntotal_inactive_file 200\n"),
            ("cpu/cpu.cfs_quota_us", "-1\n"),
            ("cpu/cpu.cfs_period_us", "100000\n"),
            ("cpu/docker/cpu.cfs_quota_us", "150000\n"),
            ("cpu/docker/cpu.cfs_period_us", "100000\n"),
        ]);
        let system = |name: &str| mount("/", &dir.path().join(name), &format!("cgroup cgroup rw,{name}"));
        let mounts = system("memory") + &system("cpu");
        let groups =
            Cgroups::parse("5:memory:/docker/c1\n4:cpuacct,cpu:/docker/c1\n0::/docker/c1\n", &mounts);
        assert_eq!(groups.memory(), [Memory { limit: 2_000, used: 500 }]);
        assert_eq!(groups.cpu_quota(), Some(1.5));
    }

    #[test]
    fn in_a_container_what_is_mounted_is_the_highest_group() {
        let dir = hierarchy(&[("cpu.max", "200000 100000\n"), ("app/cpu.max", "max 100000\n")]);
        let of = |path: &str, root: &str| {
            Cgroups::parse(&format!("0::{path}\n"), &mount(root, dir.path(), "cgroup2 cgroup2 rw"))
                .cpu_quota()
        };
        assert_eq!(of("/docker/c1/app", "/docker/c1"), Some(2.0));
        assert_eq!(of("/", "/"), Some(2.0));
        assert_eq!(of("/../../elsewhere", "/"), Some(2.0));
    }

    #[test]
    fn without_groups_there_is_no_limit() {
        for (groups, mounts) in
            [("", ""), ("0::/a\n", ""), ("nonsense", "31 23"), ("0::/a\n", "1 2 3 - cgroup2")]
        {
            let groups = Cgroups::parse(groups, mounts);
            assert_eq!((groups.cpu_quota(), groups.memory()), (None, Vec::new()));
        }
    }
}
