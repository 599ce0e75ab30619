//! What the documents say of tests is true: every test that a table names exists.

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
