//! *fusefs/SEMANTICS.md*, item by item: each item is the doc comment of the test that proves it, in the files beside this.

use std::collections::BTreeSet;

const SEMANTICS: &str = include_str!("../../fusefs/SEMANTICS.md");
const TESTS: [&str; 9] = [
    include_str!("attributes.rs"),
    include_str!("contents.rs"),
    include_str!("damage.rs"),
    include_str!("hung.rs"),
    include_str!("life.rs"),
    include_str!("many.rs"),
    include_str!("model.rs"),
    include_str!("reading.rs"),
    include_str!("refusals.rs"),
];

#[test]
fn every_item_of_semantics_is_the_doc_comment_of_a_test() {
    let one_line = |lines: Vec<&str>| lines.join(" ").split_whitespace().collect::<Vec<_>>().join(" ");
    let mut items = Vec::new();
    for paragraph in SEMANTICS.split("\n\n") {
        for item in format!("\n{paragraph}").split("\n- ").skip(1) {
            items.push(one_line(item.lines().collect()));
        }
    }
    let mut proven = BTreeSet::new();
    for source in TESTS {
        let mut comment = Vec::new();
        for line in source.lines().map(str::trim) {
            match line.strip_prefix("/// ") {
                Some(text) => comment.push(text),
                None if line == "#[test]" => drop(proven.insert(one_line(std::mem::take(&mut comment)))),
                None => comment.clear(),
            }
        }
    }
    assert!(items.len() > 20, "{items:#?}");
    let unproven: Vec<_> = items.iter().filter(|item| !proven.contains(*item)).collect();
    assert!(unproven.is_empty(), "no test has these as its doc comment: {unproven:#?}");
}
