//! Generates the lists of the files that `dim plugin new` copies into a new plugin.

#[path = "../bundled/build/workspace.rs"]
mod workspace;

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    std::fs::write(out.join("sdk.rs"), sdk(&workspace::workspace()))
        .expect("the output directory can be written to");
}

/// The Rust source of the lists: the files of the SDKs and the WIT, each with its path in the new plugin.
fn sdk(workspace: &Path) -> String {
    let mut list = String::new();
    for (name, dir, files) in [
        ("RUST_SDK", "guest", files_below(&workspace.join("guest/src"))),
        ("PYTHON_SDK", "sdk/python", files_below(&workspace.join("sdk/python"))),
        ("JAVASCRIPT_SDK", "sdk/javascript", files_below(&workspace.join("sdk/javascript"))),
        ("WIT", "", files_below(&workspace.join("wit"))),
    ] {
        let root = workspace.join(dir);
        let _ = writeln!(list, "const {name}: &[(&str, &str)] = &[");
        for file in files {
            let path = file.strip_prefix(&root).expect("each file is below its root");
            let _ = writeln!(list, "    ({path:?}, include_str!({file:?})),");
        }
        list.push_str("];\n");
    }
    list
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    println!("cargo::rerun-if-changed={}", dir.display());
    let listed =
        std::fs::read_dir(dir).unwrap_or_else(|error| panic!("cannot read {}: {error}", dir.display()));
    let mut files = Vec::new();
    for file in listed {
        let path = file.expect("a file").path();
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() && name != "__pycache__" {
            files.extend(files_below(&path));
        } else if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    files
}
