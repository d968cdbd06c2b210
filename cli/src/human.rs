//! Numbers as people read and write them: binary bytes, rates, durations.

use std::time::Duration;

const UNITS: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// `1.5 GiB`; whole bytes below 1 KiB.
#[allow(clippy::cast_precision_loss)] // three digits are shown
pub(crate) fn bytes(count: u64) -> String {
    match UNITS.iter().find(|(_, size)| count >= *size) {
        Some((unit, size)) if *size > 1 => {
            let value = count as f64 / *size as f64;
            if value >= 100.0 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
        }
        _ => format!("{count} B"),
    }
}

/// Decimal megabytes a second, as disks are sold: `1234 MB/s`.
pub(crate) fn rate(count: u64, time: Duration) -> String {
    format!("{:.0} MB/s", megabytes_per_second(count, time))
}

/// Decimal megabytes a second; 0 for no time at all.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn megabytes_per_second(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / 1e6 / time.as_secs_f64() }
}

/// `0.41 s`, `12.3 s`, `4 min 05 s`, `2 h 10 min`.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.2} s", time.as_secs_f64()),
        10..60 => format!("{:.1} s", time.as_secs_f64()),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// `1 page`, `2 pages`; for nouns that only take an s.
pub(crate) fn count(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// `131072`, `128KiB`, `64 MiB`, `1G`: powers of 1024 whatever the spelling, as PostgreSQL has it.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let refuse = || format!("\"{text}\" is not a size such as 131072, 128KiB or 64MiB");
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| refuse())?;
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1u64 << 40,
        _ => return Err(refuse()),
    };
    number.checked_mul(unit).ok_or_else(refuse)
}

/// Below this a limit keeps connections silent for so long that they are taken for lost.
const RATE_MIN: u64 = 1 << 20;

/// The most that crosses a network a second.
pub(crate) fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        rate if rate < RATE_MIN => Err(format!("{} a second is the least", bytes(RATE_MIN))),
        rate => Ok(rate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_no_plural() {
        assert_eq!([0, 1, 2].map(|number| count(number, "page")), ["0 pages", "1 page", "2 pages"]);
    }

    #[test]
    fn sizes_are_read_as_they_are_printed() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(300 << 20), "300 MiB");
        assert_eq!(parse_bytes("128KiB"), Ok(131_072));
        assert_eq!(parse_bytes("64 MiB"), Ok(64 << 20));
        assert_eq!(parse_bytes("1g"), Ok(1 << 30));
        for bad in ["", "KiB", "1x", "-1", "99999999999T"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_keep_two_numbers() {
        assert_eq!(duration(Duration::from_millis(412)), "0.41 s");
        assert_eq!(duration(Duration::from_secs(245)), "4 min 05 s");
        assert_eq!(duration(Duration::from_secs(7800)), "2 h 10 min");
    }
}
