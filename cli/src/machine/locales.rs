//! The operating system's locales: whether it has one, and the command that makes it.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

/// Which of `names` this machine lacks. The C library itself is asked, as the server asks it: it knows aliases, archives
/// and other ways of writing a name. Nothing without glibc: other C libraries take any name.
pub(super) fn missing<'a>(names: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    if super::libc_version().is_none() {
        return BTreeSet::new();
    }
    let distinct: BTreeSet<&str> = names.filter(|name| !name.is_empty() && !is_plain(name)).collect();
    distinct.into_iter().filter(|name| is_missing(name)).map(str::to_owned).collect()
}

/// `locale` says so, in English, since it has no other language then, and ends well all the same.
fn is_missing(name: &str) -> bool {
    let mut command = Command::new("locale");
    let output = command.arg("charmap").env("LC_ALL", name).env_remove("LANGUAGE").stdin(Stdio::null()).output();
    output.is_ok_and(|output| String::from_utf8_lossy(&output.stderr).contains("Cannot set LC_CTYPE"))
}

/// How many there are, if the machine tells.
pub(super) fn count() -> Option<usize> {
    super::output(Command::new("locale").arg("-a")).map(|text| text.lines().count())
}

/// Whether text is sorted by the values of its bytes alone, in every version of the C library.
pub(super) fn is_plain(name: &str) -> bool {
    name == "C" || name == "POSIX" || name.get(..2).is_some_and(|start| start.eq_ignore_ascii_case("C."))
}

/// The command that makes a locale. A name that no shell would leave alone is not put into one.
pub(super) fn cure(name: &str) -> String {
    let (base, modifier) =
        name.split_once('@').map_or((name, String::new()), |(base, rest)| (base, format!("@{rest}")));
    let is_harmless = |letter: char| letter.is_ascii_alphanumeric() || "_.@-".contains(letter);
    match base.split_once('.').filter(|_| name.chars().all(is_harmless) && !name.starts_with('-')) {
        Some((language, code_set)) => {
            let code_set = if code_set.eq_ignore_ascii_case("utf8") { "UTF-8" } else { code_set };
            format!(
                "localedef -i {language}{modifier} -f {code_set} {name}, as root (it comes with the package locales)"
            )
        }
        None => format!("make the locale {name} with localedef, or install the package that has it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locale_that_is_nowhere_is_missing_and_those_of_every_machine_are_not() {
        if super::super::libc_version().is_some() {
            let names = ["", "C", "POSIX", "C.UTF-8", "xx_XX.UTF-8", "no such\nlocale"];
            assert_eq!(missing(names.into_iter()), ["no such\nlocale", "xx_XX.UTF-8"].map(str::to_owned).into());
        }
    }

    #[test]
    fn the_command_that_makes_a_locale_can_be_typed() {
        assert!(cure("de_DE.utf8").starts_with("localedef -i de_DE -f UTF-8 de_DE.utf8, "));
        let euro = cure("de_DE.ISO-8859-15@euro");
        assert!(euro.starts_with("localedef -i de_DE@euro -f ISO-8859-15 de_DE.ISO-8859-15@euro,"));
        assert!(!cure("de_DE.UTF-8;reboot").starts_with("localedef"));
        assert!(is_plain("C.UTF-8") && is_plain("POSIX") && !is_plain("Cs_CZ") && !is_plain("de_DE.UTF-8"));
    }
}
