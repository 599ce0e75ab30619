//! What the documents say of tests and of the tree is true.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `path::name` references of a document, in backticks.
fn references(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for quoted in text.split('`').skip(1).step_by(2) {
        let Some((file, name)) = quoted.rsplit_once("::") else { continue };
        if file.ends_with(".rs") {
            found.push((file.to_owned(), name.to_owned()));
        }
    }
    found
}

fn is_a_test(source: &str, name: &str) -> bool {
    let declared = source.match_indices(&format!("fn {name}(")).map(|(at, _)| at).next();
    declared.is_some_and(|at| {
        let before = &source[..at];
        before[before.rfind("\n}\n").unwrap_or(0)..].contains("#[test]") || before.contains("proptest!")
    })
}

#[test]
fn every_test_that_a_table_names_exists() {
    for document in ["docs/pain-rows.md"] {
        let text = fs::read_to_string(root().join(document)).expect("the document");
        let references = references(&text);
        assert!(references.len() > 40, "{document} names {} tests", references.len());
        for (file, name) in references {
            let path: PathBuf = root().join(&file);
            let source = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{document}: {file}: {error}"));
            assert!(is_a_test(&source, &name), "{document}: {file} has no test {name}");
        }
    }
}

#[test]
fn every_row_of_the_table_names_a_test_or_says_why_not() {
    let text = fs::read_to_string(root().join("docs/pain-rows.md")).expect("the document");
    let mut next = 1;
    for line in text.lines().filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit()) {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").collect();
        assert_eq!(cells[0].trim(), next.to_string(), "rows are numbered: {line}");
        assert!(cells.len() == 4, "four columns: {line}");
        let covered =
            !references(cells[3]).is_empty() || cells[3].contains("hardware") || cells[3].contains("not built");
        assert!(covered, "neither a test nor a reason: {line}");
        next += 1;
    }
    assert_eq!(next, 41, "forty rows");
}

/// The parts of the library: modules and folders of `src`.
fn parts() -> BTreeSet<String> {
    let entries = fs::read_dir(root().join("src")).expect("the sources").flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().trim_end_matches(".rs").to_owned());
    names.filter(|name| name != "lib").collect()
}

/// The first drawing behind a heading.
fn drawing<'a>(text: &'a str, heading: &str) -> &'a str {
    let (_, behind) = text.split_once(heading).expect("the heading");
    let (_, inside) = behind.split_once("```text\n").expect("a drawing");
    inside.split_once("```").expect("its end").0
}

#[test]
fn the_readmes_drawing_names_every_part_of_the_tree_and_nothing_else() {
    let text = fs::read_to_string(root().join("README.md")).expect("the README");
    let drawing = drawing(&text, "## How it is built");
    let named = drawing.split(|c: char| c.is_whitespace() || c == ',').filter_map(|word| word.strip_prefix("src/"));
    let named: BTreeSet<String> = named.map(|word| word.trim_end_matches(['/', ':']).to_owned()).collect();
    assert_eq!(named, parts());
    for folder in ["kernels/", "tests/sim/"] {
        assert!(drawing.contains(folder) && root().join(folder).is_dir(), "{folder}");
    }
}

#[test]
fn the_drawing_in_the_source_names_every_module() {
    let text = fs::read_to_string(root().join("src/lib.rs")).expect("the library's root");
    let drawing = drawing(&text, "//! twoshot");
    // A name begins a column: two spaces or the row's name before it, two spaces or a slash behind it.
    let columns = drawing.lines().flat_map(|line| line.trim_start_matches("//!").split("  "));
    let named: BTreeSet<&str> = columns.map(|words| words.trim().trim_end_matches('/')).collect();
    for module in parts().iter().filter(|part| *part != "bin") {
        assert!(named.iter().any(|words| *words == module || words.ends_with(&format!(" {module}"))), "no {module}");
    }
}

#[test]
fn documents_that_are_named_exist() {
    let folder = root().join("docs");
    let mut documents: Vec<PathBuf> = fs::read_dir(folder).expect("docs").flatten().map(|entry| entry.path()).collect();
    documents
        .extend(["README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"].map(|name| root().join(name)));
    let mut checked = 0;
    for document in documents {
        let text = fs::read_to_string(&document).expect("a document");
        for word in text.split(|c: char| c.is_whitespace() || "`()[],;".contains(c)) {
            let word = word.trim_end_matches(['.', ':']);
            if word.starts_with("docs/") && word.ends_with(".md") {
                assert!(root().join(word).is_file(), "{}: {word}", document.display());
                checked += 1;
            }
        }
    }
    assert!(checked > 10, "{checked}");
}
