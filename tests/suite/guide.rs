//! The guide for authors, `docs/plugins.md`, and the first steps of the README and of `docs/getting-started.md`: every
//! command in them is run, and what it writes stands there. With `DIM_BLESS=1` it is written there.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use dim_tests::{Program, javascript, python};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// The state directory as the pages show it.
const STATE: &str = "/home/ada/.local/state/dim";

/// Whoever writes into the guide, of several sections.
static WRITING: Mutex<()> = Mutex::new(());

const GUIDE: &str = "../docs/plugins.md";

/// The lines of one section of the guide, with the number of the first.
fn section(text: &str, heading: &str) -> (usize, Vec<String>) {
    let lines: Vec<&str> = text.lines().collect();
    let begin = lines.iter().position(|line| *line == heading).unwrap_or_else(|| panic!("no {heading:?}"));
    let end = lines[begin + 1..].iter().position(|line| line.starts_with("## "));
    let end = end.map_or(lines.len(), |end| begin + 1 + end);
    (begin, lines[begin..end].iter().map(|line| (*line).to_owned()).collect())
}

/// A reader who does what a section says.
struct Reader {
    dir: TempDir,
    cwd: PathBuf,
    env: BTreeMap<&'static str, String>,
    host: Option<Program>,
}

impl Reader {
    fn new(dir: TempDir, env: BTreeMap<&'static str, String>) -> Self {
        let bin = dir.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        std::os::unix::fs::symlink(PROGRAM, bin.join("dim")).unwrap();
        let cwd = dir.path().join("here");
        std::fs::create_dir(&cwd).unwrap();
        let path = env.get("PATH").cloned().unwrap_or_else(|| std::env::var("PATH").unwrap_or_default());
        let mut env = env;
        env.insert("PATH", format!("{}:{path}", bin.display()));
        env.insert("DIM_STATE_DIR", dir.path().join("state").display().to_string());
        Self { dir, cwd, env, host: None }
    }

    /// Does what a line says; returns what is written to standard output.
    fn does(&mut self, command: &str) -> String {
        if let Some(dir) = command.strip_prefix("cd ") {
            self.cwd.push(dir);
            return String::new();
        }
        if command == "dim run &" {
            self.host =
                Some(Program::start(Path::new(PROGRAM), &self.dir.path().join("state"), &["--embedded"]));
            return String::new();
        }
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).current_dir(&self.cwd).envs(&self.env).stdin(Stdio::null());
        let output = shell.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let written = String::from_utf8(output.stdout).unwrap();
        // One that fails on purpose says why: on standard output, or in one line on standard error.
        match said.strip_suffix('\n') {
            _ if output.status.success() || written.contains("FAILED") => written,
            Some(error) if error.starts_with("error: ") && !error.contains('\n') => written + error,
            _ => panic!("{command}: {written}{said}"),
        }
    }

    /// Writes the file that a section gives as a whole from one of its lines on.
    fn writes(&self, line: &str, rest: &[String]) {
        let Some(file) = line.strip_prefix("<!-- new ").and_then(|line| line.strip_suffix(" -->")) else {
            return;
        };
        let text: Vec<&str> =
            rest[1..].iter().map(String::as_str).take_while(|line| *line != "```").collect();
        std::fs::write(self.cwd.join(file), text.join("\n") + "\n").unwrap();
    }

    /// What the section says once its commands were run, with what they write.
    fn reads(&mut self, lines: &[String]) -> Vec<String> {
        let mut out = Vec::new();
        let mut is_console = false;
        for (number, line) in lines.iter().enumerate() {
            self.writes(line, &lines[number + 1..]);
            match line.as_str() {
                "```console" => is_console = true,
                "```" => is_console = false,
                _ => {}
            }
            match line.strip_prefix("$ ").filter(|_| is_console) {
                Some(command) => {
                    out.push(line.clone());
                    let written = self.does(command);
                    let written = written.replace(&self.env["DIM_STATE_DIR"], STATE);
                    let written = written.lines().map(|line| without_time(line.trim_end()));
                    // The page leaves out what follows on such a line.
                    let told = lines[number + 1..].iter().take_while(|line| !line.starts_with(['$', '`']));
                    match told.clone().position(|line| line == "…") {
                        Some(shown) => out.extend(written.take(shown).chain(["…".to_owned()])),
                        None => out.extend(written),
                    }
                }
                // What a command has written, as the guide has it.
                None if is_console && line != "```console" => {}
                None => out.push(line.clone()),
            }
        }
        out
    }

    /// Code in the guide stands in the file that it names.
    fn finds_code(&self, lines: &[String]) {
        for (number, line) in lines.iter().enumerate() {
            let Some(file) = line.strip_prefix("<!-- ").and_then(|line| line.strip_suffix(" -->")) else {
                continue;
            };
            let file = file.strip_prefix("new ").unwrap_or(file);
            let code: Vec<&str> =
                lines[number + 2..].iter().map(String::as_str).take_while(|line| *line != "```").collect();
            let text = std::fs::read_to_string(self.cwd.join(file)).unwrap();
            assert!(text.contains(&code.join("\n")), "{file} has other code than the guide");
        }
    }
}

/// What a scenario has come to, without how long it took: that is of the machine and of how `dim` was built.
fn without_time(line: &str) -> String {
    let is_told = line.starts_with("ok ") || line.starts_with("FAILED ");
    match line.rsplit_once(", ").filter(|(_, time)| is_told && time.ends_with("s)")) {
        Some((told, time)) if time.starts_with(|c: char| c.is_ascii_digit()) && !time.contains(' ') => {
            format!("{told})")
        }
        _ => line.to_owned(),
    }
}

/// What changes from one run to the next: numbers, digests, keys and times.
fn without_particulars(line: &str) -> String {
    let mut out = String::new();
    let word = |out: &mut String, word: &str| {
        let is_particular = word.chars().any(|c| c.is_ascii_digit()) && word.len() >= 3
            || word.starts_with("z6Mk")
            || word.parse::<f64>().is_ok();
        let is_unit = ["KiB", "MiB", "GiB", "TiB"].contains(&word);
        out.push_str(if is_particular {
            "#"
        } else if is_unit {
            "bytes"
        } else {
            word
        });
    };
    let mut current = String::new();
    for c in line.chars() {
        if c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '_' | '-' | '+' | '/' | 'µ') {
            current.push(c);
            continue;
        }
        word(&mut out, &current);
        current.clear();
        out.push(c);
    }
    word(&mut out, &current);
    let words = out.split_whitespace().collect::<Vec<_>>().join(" ");
    // A time that is not long ago.
    words.replace("# s ago", "now")
}

fn check(heading: &str, dir: TempDir, env: BTreeMap<&'static str, String>) {
    check_page(GUIDE, heading, &mut Reader::new(dir, env));
}

fn check_page(page: &str, heading: &str, reader: &mut Reader) {
    let page = dim_tests::data(page);
    let text = std::fs::read_to_string(&page).unwrap();
    let (_, lines) = section(&text, heading);
    let read = reader.reads(&lines);
    reader.finds_code(&lines);
    if std::env::var("DIM_BLESS").is_ok_and(|value| value == "1") {
        let _writing = WRITING.lock().unwrap();
        let text = std::fs::read_to_string(&page).unwrap();
        let (begin, lines) = section(&text, heading);
        let all: Vec<&str> = text.lines().collect();
        let mut out = String::new();
        let read = read.iter().map(String::as_str);
        for line in all[..begin].iter().copied().chain(read).chain(all[begin + lines.len()..].iter().copied())
        {
            let _ = writeln!(out, "{line}");
        }
        std::fs::write(&page, out).unwrap();
        return;
    }
    let plain =
        |lines: &[String]| -> Vec<String> { lines.iter().map(|line| without_particulars(line)).collect() };
    let (said, is) = (plain(&lines), plain(&read));
    for (number, (said, is)) in said.iter().zip(&is).enumerate() {
        assert_eq!(said, is, "{heading}, line {number}; DIM_BLESS=1 writes what is so now");
    }
    assert_eq!(said.len(), is.len(), "{heading}: {read:#?}");
}

/// Checks a section whose plugin is built into the target directory of the tests. The plugins of all sections have the
/// same name, so two builds at a time would exchange their components.
fn check_in_rust(heading: &str) {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _building = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    check(heading, tempfile::tempdir().unwrap(), shared_target());
}

fn shared_target() -> BTreeMap<&'static str, String> {
    // What is built for the tests already need not be built again.
    [("CARGO_TARGET_DIR", dim_tests::data("../target/dev-test").display().to_string())].into()
}

#[test]
fn the_first_five_minutes_of_the_readme_are_what_happens() {
    let mut reader = Reader::new(tempfile::tempdir().unwrap(), BTreeMap::new());
    check_page("../README.md", "## Five minutes", &mut reader);
}

#[test]
fn the_first_steps_are_what_happens() {
    let mut reader = Reader::new(tempfile::tempdir().unwrap(), BTreeMap::new());
    for heading in ["## A host of your own", "## A dead letter", "## State as IPFS content"] {
        check_page("../docs/getting-started.md", heading, &mut reader);
    }
}

#[test]
fn the_guide_for_rust_is_what_happens() {
    check_in_rust("## In Rust");
}

#[test]
fn the_guide_for_another_layout_of_the_state_is_what_happens() {
    check_in_rust("## Another layout of the state");
}

#[test]
fn the_guide_for_recorded_events_is_what_happens() {
    check_in_rust("## Yesterday's events");
}

#[test]
#[ignore = "exhaustive tier: installs the tools of Python and builds with them"]
fn the_guide_for_python_is_what_happens() {
    if python::tool().is_some() {
        check("## In Python", tempfile::tempdir().unwrap(), BTreeMap::new());
    }
}

#[test]
#[ignore = "exhaustive tier: installs the tools of JavaScript and builds with them"]
fn the_guide_for_javascript_is_what_happens() {
    if javascript::place().is_some() {
        check("## In JavaScript", tempfile::tempdir().unwrap(), BTreeMap::new());
    }
}
