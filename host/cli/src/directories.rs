//! Owns the default state directory. Receives environment variables; returns a path, by
//! <https://specifications.freedesktop.org/basedir-spec/> and `StateDirectory=` of systemd.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use thiserror::Error;

/// The error for an environment that names no state directory.
#[derive(Debug, Error)]
#[error(
    "there is no directory for the state: none of STATE_DIRECTORY, XDG_STATE_HOME and HOME is an absolute path; name the directory with {option}, or set one of these variables"
)]
pub struct NoStateDir {
    option: &'static str,
}

/// The default state directory: the first path in `$STATE_DIRECTORY`, else `$XDG_STATE_HOME/NAME`, else
/// `~/.local/state/NAME`. `option` names the alternative in the error message.
pub fn default_state_dir(name: &str, option: &'static str) -> Result<PathBuf, NoStateDir> {
    state_dir_in(name, |variable| std::env::var_os(variable)).ok_or(NoStateDir { option })
}

/// The state directory from these variables. An empty or relative value counts as unset.
fn state_dir_in(name: &str, variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |variable_name: &str| {
        variable(variable_name).map(PathBuf::from).filter(|directory| directory.is_absolute())
    };
    let of_the_unit = variable("STATE_DIRECTORY").and_then(|directories| {
        let first = directories.as_bytes().split(|byte| *byte == b':').next()?;
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(first))).filter(|directory| directory.is_absolute())
    });
    let of_the_user = || absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")));
    of_the_unit.or_else(|| Some(of_the_user()?.join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(variables: &[(&str, &str)]) -> Option<String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        };
        state_dir_in("dim", variable).map(|dir| dir.display().to_string())
    }

    #[test]
    fn what_is_empty_or_relative_counts_as_unset() {
        let home = ("HOME", "/home/ada");
        let in_home = Some("/home/ada/.local/state/dim".to_owned());
        assert_eq!(dir(&[home]), in_home);
        for unset in ["", "state", "./state", ":"] {
            assert_eq!(dir(&[("XDG_STATE_HOME", unset), home]), in_home, "{unset:?}");
            assert_eq!(dir(&[("STATE_DIRECTORY", unset), home]), in_home, "{unset:?}");
            assert_eq!(dir(&[("XDG_STATE_HOME", unset), ("HOME", unset)]), None, "{unset:?}");
        }
        assert_eq!(dir(&[]), None);
        assert_eq!(dir(&[("XDG_STATE_HOME", "/x"), home]).as_deref(), Some("/x/dim"));
    }

    #[test]
    fn the_first_state_directory_of_a_unit_is_the_one() {
        let home = ("HOME", "/home/ada");
        assert_eq!(dir(&[("STATE_DIRECTORY", "/var/lib/fleet"), home]).as_deref(), Some("/var/lib/fleet"));
        let several = ("STATE_DIRECTORY", "/var/lib/fleet:/var/lib/other");
        assert_eq!(dir(&[several, ("XDG_STATE_HOME", "/x")]).as_deref(), Some("/var/lib/fleet"));
    }
}
