//! Owns the search for an exception of a plugin in Python or JavaScript in its interpreter's output. The
//! interpreter traps, and its own stack does not help the plugin's author.

/// The last line of componentize-py, after a traceback.
const PYTHON: &str = "Python function threw an unexpected exception";

/// The last line of componentize-js, after a stack.
const JAVASCRIPT: &str = "Redirecting call to abort()";

/// An uncaught exception.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The message, with the line of the author's code.
    pub reason: String,
    /// The functions of the stack, innermost first, each with its line.
    pub stack: Vec<String>,
}

/// A function of the stack.
#[derive(Debug, PartialEq, Eq)]
struct Frame<'a> {
    function: &'a str,
    file: &'a str,
    line: &'a str,
}

/// Finds the exception that ended a call, if the output ends with one.
pub fn find(written: &[String]) -> Option<Exception> {
    let lines: Vec<&str> = written.iter().map(String::as_str).collect();
    let end = lines.iter().rposition(|line| line.starts_with(PYTHON) || line.starts_with(JAVASCRIPT))?;
    let before = &lines[..end];
    let (said, frames) = if lines[end].starts_with(PYTHON) { python(before)? } else { javascript(before)? };
    let place = frames.iter().find(|frame| frame.is_authors()).or(frames.first());
    let place = place.map(|frame| format!(" ({}:{})", frame.file, frame.line)).unwrap_or_default();
    Some(Exception { reason: format!("{said}{place}"), stack: frames.iter().map(Frame::shown).collect() })
}

/// Parses a traceback: the frames, the innermost last, and then the message.
fn python<'a>(lines: &[&'a str]) -> Option<(String, Vec<Frame<'a>>)> {
    let innermost = lines.iter().rposition(|line| python_frame(line).is_some())?;
    let said = lines[innermost + 1..].iter().find(|line| !line.starts_with(' '))?;
    let trace = lines[..=innermost].iter().rev().take_while(|line| line.starts_with(' '));
    Some(((*said).to_owned(), trace.filter_map(|line| python_frame(line)).collect()))
}

/// Parses a line `  File "/0/plugin.py", line 12, in handle`; the number is that of the directory on the module path.
fn python_frame(line: &str) -> Option<Frame<'_>> {
    let (file, rest) = line.trim_start().strip_prefix("File \"")?.split_once("\", line ")?;
    let (line, function) = rest.split_once(", in ")?;
    let on_path = file.strip_prefix('/').and_then(|file| file.split_once('/'));
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let file = on_path.filter(|(place, _)| is_number(place)).map_or(file, |(_, file)| file);
    Some(Frame { function, file, line })
}

/// Parses a stack: the message, and then the frames, the innermost first.
fn javascript<'a>(lines: &[&'a str]) -> Option<(String, Vec<Frame<'a>>)> {
    let is_own = |line: &&str| javascript_frame(line).is_some_and(|frame| !frame.is_of_tool());
    let end = lines.iter().rposition(is_own).map_or(0, |outermost| outermost + 1);
    let mut frames: Vec<Frame> = lines[..end].iter().rev().map_while(|line| javascript_frame(line)).collect();
    frames.reverse();
    // A message may have several lines.
    let before = &lines[..end - frames.len()];
    let is_begin = |line: &&str| line.split_once(':').is_some_and(|(kind, _)| kind.ends_with("Error"));
    let said = before.iter().rev().take(8).copied().find(is_begin).or(before.last().copied());
    // A thrown value need not be an error, and of a long stack the console keeps only the end.
    let received = || {
        let told = |line: &&'a str| Some(line.split_once("(received `")?.1.split_once("`)")?.0);
        lines.iter().rev().find_map(told)
    };
    Some((said.or_else(received)?.to_owned(), frames))
}

/// Parses a line `handle@plugin.js:11:24`.
fn javascript_frame(line: &str) -> Option<Frame<'_>> {
    let (function, place) = line.trim().split_once('@')?;
    let (place, column) = place.rsplit_once(':')?;
    let (file, line) = place.rsplit_once(':')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(column) && is_number(line)).then_some(Frame { function, file, line })
}

impl Frame<'_> {
    /// Whether the frame is code of the author, not of the SDK or of a standard library.
    fn is_authors(&self) -> bool {
        let of_kit = ["dim.py", "dim_component.py", "dim.js", "dim_component.js"];
        !of_kit.contains(&self.file) && !self.file.starts_with('/') && !self.is_of_tool()
    }

    /// Whether componentize-js has added the frame.
    fn is_of_tool(&self) -> bool {
        self.file.ends_with("initializer.js")
    }

    fn shown(&self) -> String {
        let function = if self.function.is_empty() { "a function" } else { self.function };
        format!("{function} ({}:{})", self.file, self.line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Option<(String, Vec<String>)> {
        let written: Vec<String> = text.lines().map(str::to_owned).collect();
        find(&written).map(|Exception { reason, stack }| (reason, stack))
    }

    const TRACEBACK: &str = r#"Traceback (most recent call last):
  File "/0/plugin.py", line 42, in total
KeyError: 'n1'
The above exception was the direct cause of the following exception:
Traceback (most recent call last):
  File "/0/dim_component.py", line 42, in handle
  File "/0/plugin.py", line 13, in handle
  File "/0/parts/sums.py", line 44, in total
    return json.loads(text)
           ^^^^^^^^^^
  File "/python/json/__init__.py", line 346, in loads
ValueError: bad node: n1
of two lines
thread '<unnamed>' (1) panicked at runtime/src/lib.rs:1293:29:
Python function threw an unexpected exception
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace"#;

    #[test]
    fn a_traceback_of_python_says_what_and_where_in_the_authors_code() {
        let (reason, stack) = found(TRACEBACK).unwrap();
        assert_eq!(reason, "ValueError: bad node: n1 (parts/sums.py:44)");
        let expected = [
            "loads (/python/json/__init__.py:346)",
            "total (parts/sums.py:44)",
            "handle (plugin.py:13)",
            "handle (dim_component.py:42)",
        ];
        assert_eq!(stack, expected);
        // The console keeps only the end of a long output.
        let (reason, _) = found(TRACEBACK.split_once("following exception:\n").unwrap().1).unwrap();
        assert_eq!(reason, "ValueError: bad node: n1 (parts/sums.py:44)");
    }

    const STACK: &str = "an earlier line
RangeError: bad node: n1
total@plugin.js:37:9
@plugin.js:11:24
handle@dim_component.js:30:27
export_handle@/tmp/90a24d4a207c/sources/initializer.js:2710:29
invalid variant tag value `undefined` (received `RangeError: bad node: n1`) specified for `Failure`
Stack:
  export_handle@/tmp/90a24d4a207c/sources/initializer.js:2751:17
Redirecting call to abort() to mozalloc_abort";

    #[test]
    fn a_stack_of_javascript_says_what_and_where_in_the_authors_code() {
        let (reason, stack) = found(STACK).unwrap();
        assert_eq!(reason, "RangeError: bad node: n1 (plugin.js:37)");
        assert_eq!(
            stack,
            ["total (plugin.js:37)", "a function (plugin.js:11)", "handle (dim_component.js:30)"]
        );
        let two_lines = STACK.replace("n1\ntotal", "n1\nand more\ntotal");
        assert_eq!(found(&two_lines).unwrap().0, "RangeError: bad node: n1 (plugin.js:37)");
        let thrown = "some text\ninvalid variant tag value `undefined` (received `some text`) specified for `Failure`\n\
            Stack:\n  export_handle@/tmp/9/sources/initializer.js:1:1\nRedirecting call to abort() to mozalloc_abort";
        assert_eq!(found(thrown).unwrap(), ("some text".to_owned(), vec![]));
        // The console keeps only the end of a long output.
        let (reason, stack) = found(STACK.split_once("n1\n").unwrap().1).unwrap();
        assert_eq!((reason.as_str(), stack.len()), ("RangeError: bad node: n1 (plugin.js:37)", 3));
    }

    #[test]
    fn what_a_plugin_has_printed_of_itself_is_no_exception() {
        for text in [
            "",
            "Traceback (most recent call last):\n  File \"/0/plugin.py\", line 1, in handle\nValueError: caught",
            "Error: caught\nhandle@plugin.js:1:2",
            "Python function threw an unexpected exception",
            "Redirecting call to abort() to mozalloc_abort",
        ] {
            assert_eq!(found(text), None, "{text}");
        }
    }
}
