//! The documentation: its links lead somewhere, its summary is complete, and the README is short.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use dim_model::time::duration_of;
use dim_server::config::Config;
use serde_json::Value;

/// Most lines of the README.
const README_LINES: usize = 200;

fn read(page: &Path) -> String {
    std::fs::read_to_string(page).unwrap_or_else(|error| panic!("{}: {error}", page.display()))
}

/// The files of a directory with an extension, in order.
fn files_in(dir: &str, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dim_tests::data(dir))
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == extension))
        .collect();
    files.sort();
    files
}

fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = Vec::new();
    for page in ["../README.md", "../CONTRIBUTING.md", "../SECURITY.md", "../CHANGELOG.md"] {
        pages.push(dim_tests::data(page));
    }
    pages.extend(files_in("../docs", "md"));
    pages
}

/// The lines of a page outside blocks of code.
fn prose(text: &str) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut is_code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            lines.push(line);
        }
    }
    lines
}

/// The anchor that GitHub makes of a heading.
fn anchor(heading: &str) -> String {
    let mut anchor = String::new();
    for c in heading.to_lowercase().chars() {
        if c == ' ' {
            anchor.push('-');
        } else if c.is_alphanumeric() || c == '-' || c == '_' {
            anchor.push(c);
        }
    }
    anchor
}

fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for line in prose(text) {
        let heading = line.trim_start_matches('#');
        if heading.len() == line.len() || !heading.starts_with(' ') {
            continue;
        }
        let first = anchor(heading.trim());
        let mut unique = first.clone();
        let mut number = 0;
        // A heading that occurs again gets a number.
        while !anchors.insert(unique.clone()) {
            number += 1;
            unique = format!("{first}-{number}");
        }
    }
    anchors
}

/// The targets of the links of a page, outside code.
fn links(text: &str) -> Vec<String> {
    let mut links = Vec::new();
    for line in prose(text) {
        let without_code: String = line.split('`').step_by(2).collect();
        for rest in without_code.split("](").skip(1) {
            links.push(rest.split(')').next().unwrap_or_default().to_owned());
        }
    }
    links
}

fn is_elsewhere(link: &str) -> bool {
    ["http://", "https://", "mailto:"].iter().any(|scheme| link.starts_with(scheme))
}

fn leads_somewhere(page: &Path, link: &str) -> bool {
    let (path, anchor) = match link.split_once('#') {
        Some((path, anchor)) => (path, Some(anchor)),
        None => (link, None),
    };
    let target = if path.is_empty() { page.to_owned() } else { page.with_file_name("").join(path) };
    target.exists() && anchor.is_none_or(|anchor| anchors(&read(&target)).contains(anchor))
}

#[test]
fn an_anchor_is_made_as_github_makes_it() {
    assert_eq!(anchor("The files of a host"), "the-files-of-a-host");
    assert_eq!(anchor("`api`"), "api");
    assert_eq!(anchor("What it doesn't promise: roles, undo"), "what-it-doesnt-promise-roles-undo");
    let twice = anchors("# Limits\n\n## Limits\n\n```console\n# no heading\n```\n");
    assert_eq!(twice.into_iter().collect::<Vec<_>>(), ["limits", "limits-1"]);
}

#[test]
fn every_link_of_the_documentation_leads_somewhere() {
    let mut broken = Vec::new();
    let mut checked = 0;
    for page in pages() {
        for link in links(&read(&page)) {
            if is_elsewhere(&link) {
                continue;
            }
            checked += 1;
            if !leads_somewhere(&page, &link) {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "links that lead nowhere: {broken:#?}");
    assert!(checked > 50, "only {checked} links were found");
}

#[test]
fn the_readme_has_at_most_200_lines() {
    let lines = read(&dim_tests::data("../README.md")).lines().count();
    assert!(lines <= README_LINES, "the README has {lines} lines");
}

#[test]
fn the_summary_lists_each_page() {
    let summary = read(&dim_tests::data("../docs/SUMMARY.md"));
    let listed: BTreeSet<String> = links(&summary).into_iter().collect();
    let mut pages = BTreeSet::new();
    for page in files_in("../docs", "md") {
        pages.insert(page.file_name().unwrap().to_string_lossy().into_owned());
    }
    pages.remove("SUMMARY.md");
    assert_eq!(listed, pages);
}

#[test]
fn the_page_on_security_names_each_fuzz_target() {
    let security = read(&dim_tests::data("../docs/security.md"));
    for target in files_in("../fuzz/fuzz_targets", "rs") {
        let name = target.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(security.contains(&format!("`{name}`")), "docs/security.md does not name {name}");
    }
}

#[test]
fn every_source_file_that_the_architecture_names_exists() {
    let text = read(&dim_tests::data("../docs/architecture.md"));
    let mut named = 0;
    for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || "/_.-".contains(c))) {
        let Some((crate_of_host, rest)) = word.split_once('/').filter(|_| word.ends_with(".rs")) else {
            continue;
        };
        // The text leaves out `host/` and `src/`.
        let short = format!("../host/{crate_of_host}/src/{rest}");
        let exists = [format!("../{word}"), short].iter().any(|path| dim_tests::data(path).is_file());
        assert!(exists, "there is no file {word}");
        named += 1;
    }
    assert!(named > 100, "{named}");
}

/// The rows of the tables of a page that have a word in backquotes, cell by cell.
pub fn rows(page: &str) -> Vec<Vec<String>> {
    let rows = page.lines().filter(|line| line.starts_with("| ") && line.contains('`'));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// The words in backquotes in a cell.
pub fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// The keys of a config and their values.
fn keys(path: &str, value: &Value, found: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(members) if !members.is_empty() => {
            for (key, value) in members {
                keys(&format!("{path}{}{key}", if path.is_empty() { "" } else { "." }), value, found);
            }
        }
        _ => drop(found.insert(path.to_owned(), value.clone())),
    }
}

/// Whether a cell gives a default value: a number, a duration, a word in backquotes, or the absence of a value.
fn is_default(cell: &str, value: &Value) -> bool {
    let first = cell.split([',', ' ']).next().unwrap_or_default();
    match value {
        Value::Null => cell.starts_with("absent"),
        Value::Array(items) => items.is_empty() && cell == "empty",
        Value::Object(_) => cell == "empty" || cell.starts_with("the ") || cell.starts_with("absent"),
        Value::Number(number) => {
            let digits: String = cell.chars().take_while(|c| c.is_ascii_digit() || *c == ',').collect();
            digits.replace(',', "") == number.to_string()
        }
        Value::String(text) => match (duration_of(text), duration_of(cell)) {
            (Ok(is), Ok(told)) => is == told,
            _ => quoted(cell).next() == Some(text),
        },
        Value::Bool(is) => first.trim_matches('`') == is.to_string(),
    }
}

#[test]
fn the_configuration_reference_has_each_key_of_the_host_with_its_default() {
    let page = read(&dim_tests::data("../docs/configuration.md"));
    let text = "fleet: { name: FLEET }\ntopics: { TOPIC: { peers: [], delivery: reliable, mirror: true, encrypt: true, group: all, from: 2h, retention: { time: 1h, bytes: 1 } } }\nnames: { KEY: { encrypt: true, group: all } }\nplugins: { NAME: {} }\n".to_owned();
    // Encrypted topics need a fleet with a roster.
    let fleet = dim_topics::identity::WriterId([7; 32]).name();
    let text = text.replace("FLEET", fleet.as_str()).replace("NAME", "a-name").replace("TOPIC", "a.topic");
    let config = serde_json::to_value(Config::parse(&text).unwrap()).unwrap();
    let mut known = BTreeMap::new();
    keys("", &config, &mut known);
    let known: BTreeMap<String, Value> = known
        .into_iter()
        .map(|(key, value)| (key.replace("a-name", "NAME").replace("a.topic", "TOPIC"), value))
        .collect();
    let documented: BTreeMap<String, String> = rows(&page)
        .into_iter()
        .filter(|cells| cells.len() == 5)
        .map(|cells| (quoted(&cells[0]).next().unwrap().to_owned(), cells[3].clone()))
        .collect();
    // The short form of its two members.
    let names: BTreeSet<&String> = documented.keys().filter(|key| *key != "signing.unsigned").collect();
    assert_eq!(names, known.keys().collect());
    for (key, value) in &known {
        // The text above sets them, because their defaults are left out.
        let is_set = ["topics.TOPIC.", "names.KEY.", "fleet.name"].iter().any(|it| key.starts_with(it));
        assert!(is_set || is_default(&documented[key], value), "{key}: {}, {value}", documented[key]);
    }
}

#[test]
fn the_configuration_reference_has_each_key_of_the_bundled_plugins_with_its_default() {
    // The host sets these from the section `ipfs`.
    let of_the_host =
        |key: &str| key.ends_with("_topic") || ["ipns_key_name", "registry_ipns", "jobs_ipns"].contains(&key);
    let page = read(&dim_tests::data("../docs/configuration.md"));
    let mut documented = BTreeMap::new();
    for cells in rows(&page).into_iter().filter(|cells| cells.len() == 6) {
        for plugin in quoted(&cells[0]) {
            let key = quoted(&cells[1]).next().unwrap().to_owned();
            documented.insert((plugin.to_owned(), key), cells[4].clone());
        }
    }
    let mut known = BTreeMap::new();
    for plugin in dim_bundled::names() {
        let manifest = dim_runtime::inspect(dim_bundled::component(plugin).unwrap()).unwrap().manifest;
        let values = manifest.config.into_iter().filter(|(key, _)| !of_the_host(key));
        known.extend(values.map(|(key, value)| ((plugin.to_owned(), key), value.default)));
    }
    assert_eq!(documented.keys().collect::<Vec<_>>(), known.keys().collect::<Vec<_>>());
    for (key, value) in &known {
        let value = value.clone().unwrap_or_default();
        assert!(is_default(&documented[key], &value), "{key:?}: {}, {value}", documented[key]);
    }
}
