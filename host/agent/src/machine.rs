//! Owns the machine's figures in the units that fleets use: cores, GiB and whole GPUs. It reads the kernel and the
//! GPU drivers, and returns the total and the free resources.

mod cgroups;
mod gpus;

use std::thread::available_parallelism;

use serde::Serialize;
use sysinfo::{MemoryRefreshKind, System};

use cgroups::Cgroups;
use gpus::{Gpu, Gpus};

/// The total and the free resources of the machine. In a container these are the resources that the container may
/// use.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Resources {
    /// The idle cores, on average since the last measurement.
    pub cpu_available: f64,
    /// The number of cores.
    pub cpu_total: f64,
    /// The memory that programs can use without swapping, in GiB.
    pub memory_available: f64,
    /// The memory, in GiB.
    pub memory_total: f64,
    /// The number of GPUs that appear to be unused.
    pub gpu_available: usize,
    /// The number of GPUs with known memory.
    pub gpu_total: usize,
    /// Each of these GPUs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<Gpu>,
}

/// The measurement of the machine's figures.
#[derive(Debug)]
pub struct Machine {
    system: System,
    gpus: Gpus,
}

impl Machine {
    /// Takes the first of the two measurements that the CPU usage needs.
    pub fn new() -> Result<Self, sysinfo::Error> {
        let mut system = System::new()?;
        system.refresh_cpu_usage();
        Ok(Self { system, gpus: Gpus::start() })
    }

    /// Measures the figures. Blocks until the GPU drivers answer, at most 2 s.
    pub fn look(&mut self) -> Resources {
        self.system.refresh_cpu_usage();
        self.system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        let groups = Cgroups::of_this_process();
        let (cpu_available, cpu_total) = self.cores(groups.cpu_quota());
        let (memory_available, memory_total) = self.memory(&groups.memory());
        let gpus = self.gpus.look();
        Resources {
            cpu_available: rounded(cpu_available),
            cpu_total: rounded(cpu_total),
            memory_available: gib(memory_available),
            memory_total: gib(memory_total),
            gpu_available: gpus.iter().filter(|gpu| gpu.is_available()).count(),
            gpu_total: gpus.len(),
            gpus,
        }
    }

    /// Returns the idle cores and all cores, limited to those that this process may use.
    fn cores(&self, quota: Option<f64>) -> (f64, f64) {
        let cores = self.system.cpus().len() as f64;
        let idle = cores * (1.0 - f64::from(self.system.global_cpu_usage()) / 100.0);
        let ours = allowed_cores().map_or(cores, |ours| ours.min(cores));
        let ours = quota.map_or(ours, |quota| ours.min(quota));
        (idle.clamp(0.0, ours), ours)
    }

    fn memory(&self, limits: &[cgroups::Memory]) -> (u64, u64) {
        let all = (self.system.available_memory(), self.system.total_memory());
        limits.iter().fold(all, |(available, total), group| {
            (available.min(group.limit.saturating_sub(group.used)), total.min(group.limit))
        })
    }
}

/// Returns the number of cores on which this process may be scheduled.
fn allowed_cores() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok();
    let listed = status.as_deref().and_then(|status| {
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        cores_in(list.trim())
    });
    // Without `/proc`, the standard library returns the number, but it rounds a quota to whole cores.
    listed.or_else(|| available_parallelism().ok().map(|ours| ours.get() as f64))
}

/// Returns the number of cores in a list of the kernel, such as `0-3,8`.
fn cores_in(list: &str) -> Option<f64> {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        Some(last.checked_sub(first)? + 1)
    };
    list.split(',').map(count).sum::<Option<u32>>().map(f64::from)
}

/// Converts bytes to GiB, with two decimals.
fn gib(bytes: u64) -> f64 {
    rounded(bytes as f64 / f64::from(1 << 30))
}

fn rounded(figure: f64) -> f64 {
    (figure * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_in_gib_to_the_hundredth() {
        assert_eq!(gib(24 << 30), 24.0);
        assert_eq!(gib(1_234_567_890), 1.15);
        assert_eq!(gib(0), 0.0);
    }

    #[test]
    fn half_a_core_is_half_a_core() {
        let machine = Machine::new().unwrap();
        assert_eq!(machine.cores(Some(0.5)).1, 0.5);
        let all = machine.cores(None).1;
        assert_eq!(machine.cores(Some(1_000.0)).1, all);
        assert!(machine.cores(Some(0.5)).0 <= 0.5);
        assert_eq!(
            (cores_in("0-3,8"), cores_in("5"), cores_in("x"), cores_in("3-1")),
            (Some(5.0), Some(1.0), None, None)
        );
    }

    #[test]
    fn what_is_available_is_no_more_than_there_is() {
        let resources = Machine::new().unwrap().look();
        assert!((0.0..=resources.cpu_total).contains(&resources.cpu_available), "{resources:?}");
        assert!(resources.memory_available > 0.0, "{resources:?}");
        assert!(resources.memory_available <= resources.memory_total, "{resources:?}");
        assert!(resources.gpu_available <= resources.gpu_total, "{resources:?}");
    }
}
