//! Command lines as lists of words, for those that are handed on.

/// The words without some options: `--name value`, `--name=value` and `--flag`. What stands behind `--` stays.
pub(crate) fn without(words: &[String], with_value: &[&str], flags: &[&str]) -> Vec<String> {
    let mut kept = Vec::new();
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        if word == "--" {
            kept.push(word.clone());
            kept.extend(rest.cloned());
            break;
        }
        if flags.contains(&word.as_str()) {
            continue;
        }
        match word.split_once('=') {
            Some((name, _)) if with_value.contains(&name) => {}
            None if with_value.contains(&word.as_str()) => {
                rest.next();
            }
            _ => kept.push(word.clone()),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_goes_with_its_value_and_nothing_else_goes() {
        let words = "restore --server https://h:1 --to /d --token-file=/t --sudo --json -- --server x";
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        let kept = without(&words, &["--server", "--token-file"], &["--sudo"]);
        assert_eq!(kept.join(" "), "restore --to /d --json -- --server x");
    }
}
