//! The operating system's locales: which there are, and whether a name is one of them.

use std::collections::BTreeSet;
use std::process::Command;

/// What `locale -a` lists, normalised. Nothing without glibc: other C libraries take any name.
pub(super) fn installed() -> Option<BTreeSet<String>> {
    super::libc_version()?;
    let text = super::output(Command::new("locale").arg("-a"))?;
    Some(text.lines().map(|line| normalised(line.trim())).collect())
}

/// A name as glibc compares it: of the code set only its letters and digits count, small: `de_DE.utf8`.
pub(super) fn normalised(name: &str) -> String {
    let (base, modifier) = match name.split_once('@') {
        Some((base, modifier)) => (base, format!("@{modifier}")),
        None => (name, String::new()),
    };
    let Some((language, code_set)) = base.split_once('.') else { return name.to_owned() };
    let letters: String = code_set.chars().filter(char::is_ascii_alphanumeric).collect();
    let letters = letters.to_ascii_lowercase();
    let iso = if letters.chars().all(|letter| letter.is_ascii_digit()) { "iso" } else { "" };
    format!("{language}.{iso}{letters}{modifier}")
}

/// Whether the machine has it. An empty name is the environment's, whichever that is; `C.UTF-8` is in glibc itself
/// wherever it matters.
pub(super) fn is_there(name: &str, installed: &BTreeSet<String>) -> bool {
    name.is_empty() || is_plain(name) || installed.contains(&normalised(name))
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
            let code_set = if normalised(base).ends_with(".utf8") { "UTF-8" } else { code_set };
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
    fn names_are_compared_as_glibc_compares_them() {
        for (name, wanted) in [
            ("de_DE.UTF-8", "de_DE.utf8"),
            ("de_DE.utf8", "de_DE.utf8"),
            ("de_DE.ISO-8859-15@euro", "de_DE.iso885915@euro"),
            ("ru_RU.8859-5", "ru_RU.iso88595"),
            ("C.UTF-8", "C.utf8"),
            ("deutsch", "deutsch"),
        ] {
            assert_eq!(normalised(name), wanted);
        }
        let installed: BTreeSet<String> = ["C", "C.utf8", "de_DE.utf8"].map(str::to_owned).into();
        for name in ["", "C", "POSIX", "C.UTF-8", "de_DE.UTF8"] {
            assert!(is_there(name, &installed), "{name}");
        }
        for name in ["de_DE", "de_AT.UTF-8", "de_DE.UTF-8@euro"] {
            assert!(!is_there(name, &installed), "{name}");
        }
    }

    #[test]
    fn the_command_that_makes_a_locale_can_be_typed() {
        assert!(cure("de_DE.utf8").starts_with("localedef -i de_DE -f UTF-8 de_DE.utf8, "));
        assert!(
            cure("de_DE.ISO-8859-15@euro")
                .starts_with("localedef -i de_DE@euro -f ISO-8859-15 de_DE.ISO-8859-15@euro,")
        );
        assert!(!cure("de_DE.UTF-8;reboot").starts_with("localedef"));
        assert!(is_plain("C.UTF-8") && is_plain("POSIX") && !is_plain("Cs_CZ") && !is_plain("de_DE.UTF-8"));
    }
}
