//! Owns writing what happened into a scenario: the lines of what is expected of each step are put in the place of those
//! that were there, and everything else stays as it is, comments too.

use std::path::Path;

use serde_json::{Map, Value};

use super::scenario::{Scenario, ScenarioError};

/// Puts what each step on top has brought about into the file; returns whether that changes it.
pub fn bless(path: &Path, happened: &[Option<Map<String, Value>>]) -> Result<bool, ScenarioError> {
    let file = |source| ScenarioError::File { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(file)?;
    let wrong = |why: &str| ScenarioError::Wrong { name: path.display().to_string(), why: why.to_owned() };
    let blessed = blessed(&text, happened).map_err(|why| wrong(&why))?;
    if blessed == text {
        return Ok(false);
    }
    // What is written can be read.
    Scenario::parse(&path.display().to_string(), &blessed)?;
    std::fs::write(path, blessed).map_err(file)?;
    Ok(true)
}

fn blessed(text: &str, happened: &[Option<Map<String, Value>>]) -> Result<String, String> {
    let lines: Vec<&str> = text.lines().collect();
    let is_bare = |rest: &str| rest.trim_start().is_empty() || rest.trim_start().starts_with('#');
    let steps = lines.iter().position(|line| line.strip_prefix("steps:").is_some_and(is_bare));
    let steps = steps
        .ok_or("to bless a scenario, `steps:` must stand on a line of its own, with a step a line below")?;
    let mut out: Vec<String> = lines[..=steps].iter().map(|line| (*line).to_owned()).collect();
    let (mut at, mut number) = (steps + 1, 0);
    while at < lines.len() {
        let line = lines[at];
        let Some(dash) = indent(line).filter(|dash| line[*dash..].starts_with("- ")) else {
            out.push(line.to_owned());
            at += 1;
            continue;
        };
        let end = (at + 1..lines.len()).find(|next| indent(lines[*next]).is_some_and(|it| it <= dash));
        let end = end.unwrap_or(lines.len());
        match happened.get(number).cloned().flatten() {
            Some(sections) => out.extend(step(&lines[at..end], dash + 2, &sections)?),
            None => out.extend(lines[at..end].iter().map(|line| (*line).to_owned())),
        }
        number += 1;
        at = end;
        if lines
            .get(at)
            .is_some_and(|line| indent(line).is_some_and(|it| it < dash || !line[it..].starts_with("- ")))
        {
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
    Ok(out.join("\n") + "\n")
}

/// A step with what is expected of it: in the place of what was, or at its end.
fn step(lines: &[&str], column: usize, happened: &Map<String, Value>) -> Result<Vec<String>, String> {
    if lines[0].trim_start_matches(['-', ' ']).starts_with('{') {
        return Err(format!("to bless a scenario, its steps must not be in braces: {}", lines[0].trim()));
    }
    let is_member = |line: &str| indent(line) == Some(column);
    let begin = lines.iter().position(|line| is_member(line) && line.trim_start().starts_with("expect:"));
    let Some(begin) = begin else {
        let mut sections = happened.clone();
        sections.retain(|section, value| is_of_the_step(section) && !is_nothing(section, value));
        let mut out: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        // Behind the step, not behind the blank lines and comments before the next one.
        let tail = out
            .iter()
            .rposition(|line| indent(line).is_some_and(|it| it >= column))
            .map_or(out.len(), |it| it + 1);
        let rest = out.split_off(tail);
        out.extend(expectation(column, &sections));
        out.extend(rest);
        return Ok(out);
    };
    let end = (begin + 1..lines.len()).find(|next| indent(lines[*next]).is_some_and(|it| it <= column));
    let end = end.unwrap_or_else(|| {
        lines[begin + 1..]
            .iter()
            .rposition(|line| indent(line).is_some())
            .map_or(begin + 1, |it| begin + it + 2)
    });
    let told: Map<String, Value> = sections_of(&lines[begin..end], column)?;
    let mut sections = happened.clone();
    // What is not told of stays untold, and what nothing is known of by a step stays as it is.
    sections.retain(|section, value| {
        told.contains_key(section) || is_of_the_step(section) && !is_nothing(section, value)
    });
    for (section, value) in told {
        // There is a reply or an error, not both.
        let other = match section.as_str() {
            "reply" => "error",
            "error" => "reply",
            _ => "",
        };
        if !sections.contains_key(other) {
            sections.entry(section).or_insert(value);
        }
    }
    let mut out: Vec<String> = lines[..begin].iter().map(|line| (*line).to_owned()).collect();
    out.extend(expectation(column, &sections));
    out.extend(lines[end..].iter().map(|line| (*line).to_owned()));
    Ok(out)
}

/// The sections of an `expect` as it stands there.
fn sections_of(lines: &[&str], column: usize) -> Result<Map<String, Value>, String> {
    let text: Vec<&str> = lines.iter().map(|line| line.get(column..).unwrap_or_default()).collect();
    let read: Map<String, Value> =
        serde_saphyr::from_str(&text.join("\n")).map_err(|error| error.to_string())?;
    match read.get("expect") {
        Some(Value::Object(sections)) => Ok(sections.clone()),
        _ => Ok(Map::new()),
    }
}

/// The lines of an `expect`. A section is one line of JSON, which is YAML, too; lists have a line for each item.
fn expectation(column: usize, sections: &Map<String, Value>) -> Vec<String> {
    if sections.is_empty() {
        return Vec::new();
    }
    let pad = " ".repeat(column);
    let mut lines = vec![format!("{pad}expect:")];
    for (section, value) in sections {
        match value {
            Value::Array(items) if !items.is_empty() => {
                lines.push(format!("{pad}  {section}:"));
                lines.extend(items.iter().map(|item| format!("{pad}    - {item}")));
            }
            Value::Object(members) if !members.is_empty() && section != "reply" => {
                lines.push(format!("{pad}  {section}:"));
                let key = |name: &String| Value::String(name.clone());
                lines.extend(members.iter().map(|(name, value)| format!("{pad}    {}: {value}", key(name))));
            }
            value => lines.push(format!("{pad}  {section}: {value}")),
        }
    }
    lines
}

/// Whether a section says what a step has brought about, rather than how things stand after it: that is written only
/// where it was told of before.
fn is_of_the_step(section: &str) -> bool {
    !["state", "timers", "hears", "follows"].contains(&section)
}

fn is_nothing(section: &str, value: &Value) -> bool {
    // An empty reply is one.
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
        let blessed = blessed(text, &happened).unwrap();
        let expected = "# A comment.\ngiven: { seed: 3 }\nsteps: # In order.\n- message: t\n  data: 1\n  # Why so.\n  expect:\n    names:\n      \"k\": {\"a\":1}\n    publishes:\n      - {\"data\":2,\"topic\":\"u\"}\n    state: \n";
        assert!(blessed.starts_with(&expected[..expected.len() - 12]), "{blessed}");
        assert!(blessed.contains("# The next.\n- wait: 3s\n"), "{blessed}");
        assert!(
            blessed.contains("- query: q\n  expect:\n    reply: {\"b\":[1]}\nexpect: { dead: [] }\n"),
            "{blessed}"
        );
        Scenario::parse("it", &blessed).unwrap();
        let braces = super::blessed("steps:\n- { wait: 3s }\n", &happened[1..2]).unwrap_err();
        assert!(braces.contains("braces"), "{braces}");
    }
}
