//! Owns blessing: writing the actual results into a scenario file. Receives the results of each step; replaces the
//! lines of its expectations and leaves everything else as it is, including comments.

use std::path::Path;

use dim_model::error_chain::in_yaml;
use serde_json::{Map, Value};

use crate::scenario::{Scenario, ScenarioError};

/// Writes the results of each top-level step into the file. Returns whether the file has changed. Fails if the file
/// cannot be read or written, or if its layout is not supported.
pub fn bless(path: &Path, happened: &[Option<Map<String, Value>>]) -> Result<bool, ScenarioError> {
    if happened.iter().all(Option::is_none) {
        return Ok(false);
    }
    let file = |source| ScenarioError::File { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(file)?;
    let wrong = |why: &str| ScenarioError::Wrong { name: path.display().to_string(), why: why.to_owned() };
    let blessed = blessed(&text, happened).map_err(|why| wrong(&why))?;
    if text.lines().eq(blessed.iter()) {
        return Ok(false);
    }
    let end = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let blessed = blessed.join(end) + end;
    // The result must be a valid scenario before it replaces the file.
    Scenario::parse(&path.display().to_string(), &blessed)?;
    std::fs::write(path, blessed).map_err(file)?;
    Ok(true)
}

fn blessed(text: &str, happened: &[Option<Map<String, Value>>]) -> Result<Vec<String>, String> {
    let lines: Vec<&str> = text.lines().collect();
    let steps = lines.iter().position(|line| line.strip_prefix("steps:").is_some_and(is_bare));
    let steps = steps.ok_or(
        "to bless a scenario, `steps:` must be on a line of its own, with each step on the lines below",
    )?;
    let mut out: Vec<String> = lines[..=steps].iter().map(|line| (*line).to_owned()).collect();
    let is_step = |line: &str, dash: usize| line[dash..].starts_with("- ") || line[dash..].trim_end() == "-";
    let (mut at, mut number) = (steps + 1, 0);
    while at < lines.len() {
        let line = lines[at];
        let Some(dash) = indent(line).filter(|dash| is_step(line, *dash)) else {
            out.push(line.to_owned());
            at += 1;
            continue;
        };
        let end = (at + 1..lines.len()).find(|next| indent(lines[*next]).is_some_and(|it| it <= dash));
        let end = end.unwrap_or(lines.len());
        match happened.get(number).cloned().flatten() {
            Some(sections) => out.extend(step(&lines[at..end], dash, sections)?),
            None => out.extend(lines[at..end].iter().map(|line| (*line).to_owned())),
        }
        number += 1;
        at = end;
        let is_over = |line: &str| indent(line).is_some_and(|it| it < dash || !is_step(line, it));
        if lines.get(at).is_some_and(|line| is_over(line)) {
            out.extend(lines[at..].iter().map(|line| (*line).to_owned()));
            break;
        }
    }
    if number != happened.len() {
        return Err(format!(
            "to bless a scenario, each step must begin with a dash on a line of its own: {number} of {} do",
            happened.len()
        ));
    }
    Ok(out)
}

/// Whether the rest of a line is empty or a comment.
fn is_bare(rest: &str) -> bool {
    rest.trim_start().is_empty() || rest.trim_start().starts_with('#')
}

/// The lines of a step with the results as its expectation. They replace an existing `expect`, or follow the step.
fn step(lines: &[&str], dash: usize, mut happened: Map<String, Value>) -> Result<Vec<String>, String> {
    let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    // A blank instead of the dash puts all members into the same column.
    lines[0].replace_range(dash..=dash, " ");
    let Some((first, column)) = lines.iter().find_map(|line| Some((line, indent(line)?))) else {
        return Err("to bless a scenario, its steps must not be empty".to_owned());
    };
    if first[column..].starts_with('{') {
        return Err(format!("to bless a scenario, its steps must not be in braces: {}", first.trim()));
    }
    let begin = lines.iter().position(|line| indent(line) == Some(column) && key_of(line) == "expect");
    let told = match begin {
        None => lines.len(),
        Some(begin) => {
            let next = |line: &String| indent(line).is_some_and(|it| it <= column);
            lines[begin + 1..].iter().position(next).map_or(lines.len(), |it| begin + 1 + it)
        }
    };
    // Blank lines and comments at the end belong to the following lines.
    let last = lines[..told].iter().rposition(|line| indent(line).is_some()).map_or(told, |it| it + 1);
    let rest = lines.split_off(last);
    let expected = lines.split_off(begin.unwrap_or(lines.len()));
    let told = sections_of(&expected, column)?;
    // A section without an expectation gets one only if it is a result of the step itself and not empty.
    happened.retain(|section, value| {
        told.contains_key(section) || is_of_the_step(section) && !is_nothing(section, value)
    });
    lines.extend(expectation(&expected, column, told, happened));
    lines.extend(rest);
    if let Some(first) = lines.first_mut() {
        // The line that is now the first may be too short for the dash.
        let missing = (dash + 1).saturating_sub(first.len());
        first.push_str(&" ".repeat(missing));
        first.replace_range(dash..=dash, "-");
    }
    Ok(lines)
}

/// The key of a member, without quotes.
fn key_of(line: &str) -> &str {
    let key = line.split_once(':').map_or("", |(key, _)| key.trim());
    key.trim_matches(['"', '\''])
}

/// Parses the sections of an existing `expect`.
fn sections_of(lines: &[String], column: usize) -> Result<Map<String, Value>, String> {
    let text: Vec<&str> = lines.iter().map(|line| line.get(column..).unwrap_or_default()).collect();
    if text.is_empty() {
        return Ok(Map::new());
    }
    let read: Map<String, Value> =
        serde_saphyr::from_str(&text.join("\n")).map_err(|error| in_yaml(&error))?;
    match read.get("expect") {
        Some(Value::Object(sections)) => Ok(sections.clone()),
        _ => Ok(Map::new()),
    }
}

/// The section that excludes this one: a step has a reply or an error, not both.
fn other_of(section: &str) -> &str {
    match section {
        "reply" => "error",
        "error" => "reply",
        _ => "",
    }
}

/// The lines of an `expect` with the results in `happened`. A section on separate lines keeps them if there is no new
/// result for it.
fn expectation(
    lines: &[String],
    column: usize,
    mut told: Map<String, Value>,
    mut happened: Map<String, Value>,
) -> Vec<String> {
    told.retain(|section, _| !happened.contains_key(other_of(section)));
    let mut out = Vec::new();
    let is_block = lines.first().is_some_and(|line| line.split_once(':').is_some_and(|(_, it)| is_bare(it)));
    let below = lines.iter().skip(1).find_map(|line| indent(line)).filter(|_| is_block);
    if let Some(inner) = below {
        out.push(lines[0].clone());
        let mut at = 1;
        while at < lines.len() {
            let next = (at + 1..lines.len()).find(|next| indent(&lines[*next]) == Some(inner));
            let chunk = &lines[at..next.unwrap_or(lines.len())];
            at += chunk.len();
            if indent(&chunk[0]) != Some(inner) {
                out.extend(chunk.iter().cloned());
                continue;
            }
            let section = key_of(&chunk[0]).to_owned();
            let is_told = told.remove(&section).is_some();
            match happened.remove(&section) {
                Some(value) => {
                    out.extend(section_lines(inner, &section, &value));
                    // Comments at the end of a section belong to the next one.
                    let kept = chunk.iter().rposition(|line| indent(line).is_some()).map_or(0, |it| it + 1);
                    out.extend(chunk[kept..].iter().cloned());
                }
                None if is_told => out.extend(chunk.iter().cloned()),
                None => {}
            }
        }
        out.extend(happened.iter().flat_map(|(section, value)| section_lines(inner, section, value)));
        return out;
    }
    told.extend(happened);
    if !told.is_empty() {
        out.push(format!("{}expect:", " ".repeat(column)));
        out.extend(told.iter().flat_map(|(section, value)| section_lines(column + 2, section, value)));
    }
    out
}

/// The lines of a section: JSON in one line, which is also valid YAML. Lists and objects get a line for each item.
fn section_lines(column: usize, section: &str, value: &Value) -> Vec<String> {
    let pad = " ".repeat(column);
    match value {
        Value::Array(items) if !items.is_empty() => {
            let items = items.iter().map(|item| format!("{pad}  - {item}"));
            std::iter::once(format!("{pad}{section}:")).chain(items).collect()
        }
        Value::Object(members) if !members.is_empty() && section != "reply" => {
            let key = |name: &String| Value::String(name.clone());
            let members = members.iter().map(|(name, value)| format!("{pad}  {}: {value}", key(name)));
            std::iter::once(format!("{pad}{section}:")).chain(members).collect()
        }
        value => vec![format!("{pad}{section}: {value}")],
    }
}

/// Whether a section describes results of a step. The other sections describe the situation after it; they are written
/// only if they were expected before.
fn is_of_the_step(section: &str) -> bool {
    !["state", "timers", "hears", "follows"].contains(&section)
}

fn is_nothing(section: &str, value: &Value) -> bool {
    // An empty reply is still a reply.
    if ["reply", "error"].contains(&section) {
        return false;
    }
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
        Value::Null => true,
        _ => false,
    }
}

/// The column in which a line begins; none of one that is empty or a comment.
fn indent(line: &str) -> Option<usize> {
    let text = line.trim_start();
    (!text.is_empty() && !text.starts_with('#')).then(|| line.len() - text.len())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_happened_is_written_and_everything_else_stays() {
        let text = "# A comment.\ngiven: { seed: 3 }\nsteps: # In order.\n- message: t\n  data: 1\n  # Why so.\n  expect:\n    publishes: []\n    state: { k: 1 }\n\n# The next.\n- wait: 3s\n\n- query: q\nexpect: { dead: [] }\n";
        let sections = |value: Value| Some(value.as_object().unwrap().clone());
        let happened = [
            sections(
                json!({ "publishes": [{ "topic": "u", "data": 2 }], "log": [], "names": { "k": { "a": 1 } } }),
            ),
            sections(json!({ "publishes": [], "log": [] })),
            sections(json!({ "reply": { "b": [1] } })),
        ];
        let blessed = blessed(text, &happened).unwrap().join("\n") + "\n";
        let expected = "# A comment.\ngiven: { seed: 3 }\nsteps: # In order.\n- message: t\n  data: 1\n  # Why so.\n  expect:\n    publishes:\n      - {\"data\":2,\"topic\":\"u\"}\n    state: { k: 1 }\n    names:\n      \"k\": {\"a\":1}\n\n# The next.\n- wait: 3s\n\n- query: q\n  expect:\n    reply: {\"b\":[1]}\nexpect: { dead: [] }\n";
        assert_eq!(blessed, expected);
        Scenario::parse("it", &blessed).unwrap();
        // What holds stays to the letter, wherever the members of a step stand.
        let text = "steps:\n- expect:\n    timers: { t: \"${now+30s}\" } # So late.\n    # Any line.\n    log: [\"<any>\"]\n    publishes: [1]\n\n    # It is told.\n    reply: 1\n  message: t\n-\n    wait: 1s\n    expect: { state: { k: \"${now}\" }, log: [] }\n";
        let happened = [
            sections(json!({ "publishes": [], "error": "no" })),
            sections(json!({ "log": ["a line"], "reply": null })),
        ];
        let blessed = super::blessed(text, &happened).unwrap().join("\n") + "\n";
        let expected = "steps:\n- expect:\n    timers: { t: \"${now+30s}\" } # So late.\n    # Any line.\n    log: [\"<any>\"]\n    publishes: []\n\n    # It is told.\n    error: \"no\"\n  message: t\n-\n    wait: 1s\n    expect:\n      log:\n        - \"a line\"\n      reply: null\n      state:\n        \"k\": \"${now}\"\n";
        assert_eq!(blessed, expected);
        let happened = [sections(json!({ "log": ["a line"] }))];
        let braces = super::blessed("steps:\n- { wait: 3s }\n", &happened).unwrap_err();
        assert!(braces.contains("braces"), "{braces}");
    }
}
