//! Moments as people write them, resolved to one instant before PostgreSQL sees them.
//!
//! PostgreSQL reads `recovery_target_time` in the time zone of its own configuration, refuses `yesterday` only after
//! the copy, and takes an hour that a clock change skipped or repeated without a word. Here a moment ends as an
//! instant with its offset, or as a refusal that says what to add.
//!
//! Understood: `2026-11-22 08:15`, seconds and fractions, `T` for the blank; an offset (`+01`, `+0530`, `-03:30`),
//! `Z`, `UTC`, or a name of the time zone database (`Europe/Berlin`) behind it, else the local zone (`TZ`); a date
//! alone is its midnight; `now`; `today` and `yesterday`, with or without a time; `10 minutes ago`.

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use jiff::{Span, Timestamp, ToSpan};

/// The instant that `text` means to somebody who reads the clock `now` in `local`.
pub(crate) fn parse(text: &str, now: Timestamp, local: &TimeZone) -> Result<Timestamp, String> {
    let text = text.trim();
    if text.eq_ignore_ascii_case("now") {
        return Ok(now);
    }
    if let Some(span) = text.strip_suffix(" ago").or_else(|| text.strip_suffix(" AGO")) {
        let earlier = now.to_zoned(local.clone()).checked_sub(span_of(span)?);
        return earlier.map(|moment| moment.timestamp()).map_err(|cause| format!("\"{text}\": {cause}"));
    }
    let (date, rest) = date_of(text, now, local).ok_or_else(|| refusal(text))?;
    let (time, zone) = time_of(rest).ok_or_else(|| refusal(text))?;
    let zone = zone_of(zone, local)?;
    instant(text, date.to_datetime(time), &zone)
}

/// As PostgreSQL reads it back whatever its time zone: `2026-11-22 08:15:00.000000+00`.
pub(crate) fn for_postgresql(moment: Timestamp) -> String {
    let utc = Offset::UTC.to_datetime(moment);
    format!("{} {}+00", utc.date(), clock(utc.time()))
}

/// For people: `2026-11-22 08:15:00+00`.
pub(crate) fn for_people(moment: Timestamp) -> String {
    let text = for_postgresql(moment);
    text.strip_suffix(".000000+00").map(|whole| format!("{whole}+00")).unwrap_or(text)
}

fn clock(time: Time) -> String {
    let microsecond = time.subsec_nanosecond() / 1000;
    format!("{:02}:{:02}:{:02}.{microsecond:06}", time.hour(), time.minute(), time.second())
}

fn refusal(text: &str) -> String {
    format!("\"{text}\" is not a time such as \"2026-11-22 08:15:00+00\", \"yesterday 17:30\" or \"10 minutes ago\"")
}

/// `1 hour 30 minutes`.
fn span_of(text: &str) -> Result<Span, String> {
    let refuse = || refusal(&format!("{text} ago"));
    let mut span = Span::new();
    let mut words = text.split_whitespace().peekable();
    if words.peek().is_none() {
        return Err(refuse());
    }
    while let Some(count) = words.next() {
        let count: i64 = count.parse().ok().filter(|count| (0..=1_000_000).contains(count)).ok_or_else(refuse)?;
        let more = match words.next().unwrap_or_default().to_ascii_lowercase().trim_end_matches('s') {
            "second" | "sec" => count.seconds(),
            "minute" | "min" => count.minutes(),
            "hour" => count.hours(),
            "day" => count.days(),
            "week" => count.weeks(),
            _ => return Err(refuse()),
        };
        span = span.checked_add((more, jiff::SpanRelativeTo::days_are_24_hours())).map_err(|_| refuse())?;
    }
    Ok(span)
}

/// The date at the beginning, and what follows it.
fn date_of<'a>(text: &'a str, now: Timestamp, local: &TimeZone) -> Option<(Date, &'a str)> {
    let stop = text.find([' ', 'T', 't']).filter(|stop| *stop >= 10).or_else(|| text.find(' ')).unwrap_or(text.len());
    let (word, rest) = text.split_at(stop);
    let rest = rest.strip_prefix([' ', 'T', 't']).unwrap_or(rest).trim_start();
    let today = local.to_datetime(now).date();
    match word.to_ascii_lowercase().as_str() {
        "today" => Some((today, rest)),
        "yesterday" => Some((today.yesterday().ok()?, rest)),
        _ => {
            let mut parts = word.splitn(3, '-');
            let (year, month, day) = (digits(parts.next()?, 4)?, digits(parts.next()?, 2)?, digits(parts.next()?, 2)?);
            Some((Date::new(year, i8::try_from(month).ok()?, i8::try_from(day).ok()?).ok()?, rest))
        }
    }
}

/// The time of day at the beginning (midnight if there is none), and the zone behind it.
fn time_of(text: &str) -> Option<(Time, &str)> {
    if !text.starts_with(|letter: char| letter.is_ascii_digit()) {
        return Some((Time::midnight(), text.trim()));
    }
    let stop = text.find(|letter: char| !(letter.is_ascii_digit() || letter == ':' || letter == '.'));
    let (clock, zone) = text.split_at(stop.unwrap_or(text.len()));
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let mut parts = clock.split(':');
    let (hour, minute) = (digits(parts.next()?, 2)?, digits(parts.next()?, 2)?);
    let second = parts.next().map_or(Some(0), |second| digits(second, 2))?;
    let plain = parts.next().is_none() && (1..=9).contains(&fraction.len());
    let fraction: i32 = plain.then(|| format!("{fraction:0<9}").parse().ok()).flatten()?;
    let narrow = |number: i16| i8::try_from(number).ok();
    Some((Time::new(narrow(hour)?, narrow(minute)?, narrow(second)?, fraction).ok()?, zone.trim()))
}

fn digits(text: &str, count: usize) -> Option<i16> {
    let plain = text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

fn zone_of(text: &str, local: &TimeZone) -> Result<TimeZone, String> {
    if text.is_empty() {
        return Ok(local.clone());
    }
    if ["z", "utc", "gmt"].contains(&text.to_ascii_lowercase().as_str()) {
        return Ok(TimeZone::UTC);
    }
    if text.starts_with(['+', '-']) {
        return offset_of(text)
            .map(TimeZone::fixed)
            .ok_or_else(|| format!("\"{text}\" is not an offset such as +01:00"));
    }
    // Abbreviations mean different offsets to different people (CST, IST, BST): only full names are taken.
    if !text.contains('/') {
        return Err(format!(
            "the time zone \"{text}\" is not unique: give an offset such as +01:00, or a name such as Europe/Berlin"
        ));
    }
    TimeZone::get(text)
        .map_err(|_| format!("the time zone \"{text}\" is not known here: give an offset such as +01:00"))
}

/// `+1`, `+01`, `+0530`, `+05:30`.
fn offset_of(text: &str) -> Option<Offset> {
    let (sign, rest) = text.split_at(1);
    let (hours, minutes) = match rest.split_once(':') {
        Some(parts) => parts,
        None if rest.len() == 4 => rest.split_at_checked(2)?,
        None => (rest, "00"),
    };
    let hours = digits(hours, hours.len()).filter(|hours| (0..=15).contains(hours))?;
    let minutes = digits(minutes, 2).filter(|minutes| *minutes < 60)?;
    let seconds = (i32::from(hours) * 60 + i32::from(minutes)) * 60;
    Offset::from_seconds(if sign == "-" { -seconds } else { seconds }).ok()
}

/// The one instant at which a clock in `zone` shows `wanted`; a clock change may have made none or two.
fn instant(text: &str, wanted: DateTime, zone: &TimeZone) -> Result<Timestamp, String> {
    let name = zone.iana_name().unwrap_or("the local time zone");
    let offset = match zone.to_ambiguous_timestamp(wanted).offset() {
        AmbiguousOffset::Unambiguous { offset } => offset,
        AmbiguousOffset::Gap { before, after } => {
            return Err(format!(
                "\"{text}\" does not exist in {name}, whose clocks went from {before} to {after} then: give an offset"
            ));
        }
        AmbiguousOffset::Fold { before, after } => {
            let with = |offset: Offset| format!("\"{} {}{offset}\"", wanted.date(), wanted.time());
            let (one, other) = (with(before), with(after));
            return Err(format!("\"{text}\" exists twice in {name}: give the offset, {one} or {other}"));
        }
    };
    offset.to_timestamp(wanted).map_err(|cause| format!("\"{text}\": {cause}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn berlin() -> TimeZone {
        // Central European rules as a POSIX string: the test needs no time zone database.
        TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
    }

    fn resolved(text: &str) -> Result<String, String> {
        let now = "2026-11-22T12:00:00Z".parse().unwrap();
        parse(text, now, &berlin()).map(for_postgresql)
    }

    #[test]
    fn a_moment_is_resolved_to_an_instant_with_its_offset() {
        for (text, instant) in [
            ("2026-11-22 08:15:00+00", "2026-11-22 08:15:00.000000+00"),
            ("2026-11-22T08:15:00.25Z", "2026-11-22 08:15:00.250000+00"),
            ("2026-11-22 08:15:00.123456+05:30", "2026-11-22 02:45:00.123456+00"),
            ("2026-11-22 08:15 -0330", "2026-11-22 11:45:00.000000+00"),
            ("2026-11-22 08:15:00 utc", "2026-11-22 08:15:00.000000+00"),
            ("2026-11-22 08:15", "2026-11-22 07:15:00.000000+00"),
            ("2026-07-22 08:15", "2026-07-22 06:15:00.000000+00"),
            ("2026-11-22", "2026-11-21 23:00:00.000000+00"),
            ("today 08:15", "2026-11-22 07:15:00.000000+00"),
            ("Yesterday", "2026-11-20 23:00:00.000000+00"),
            ("now", "2026-11-22 12:00:00.000000+00"),
            ("10 minutes ago", "2026-11-22 11:50:00.000000+00"),
            ("1 hour 30 min ago", "2026-11-22 10:30:00.000000+00"),
            ("2 days ago", "2026-11-20 12:00:00.000000+00"),
        ] {
            assert_eq!(resolved(text).as_deref(), Ok(instant), "{text}");
        }
    }

    #[test]
    fn an_hour_that_a_clock_change_repeats_or_skips_asks_for_the_offset() {
        assert_eq!(
            resolved("2026-10-25 02:30").unwrap_err(),
            "\"2026-10-25 02:30\" exists twice in the local time zone: give the offset, \"2026-10-25 02:30:00+02\" or \"2026-10-25 02:30:00+01\""
        );
        assert_eq!(
            resolved("2026-03-29 02:30").unwrap_err(),
            "\"2026-03-29 02:30\" does not exist in the local time zone, whose clocks went from +01 to +02 then: give an offset"
        );
        for offset in ["+02", "+01"] {
            assert!(resolved(&format!("2026-10-25 02:30:00{offset}")).is_ok(), "{offset}");
        }
        assert_eq!(resolved("2026-10-25 02:30+02").as_deref(), Ok("2026-10-25 00:30:00.000000+00"));
    }

    #[test]
    fn what_is_not_a_moment_is_refused() {
        for text in [
            "",
            "soon",
            "11/22/2026",
            "2026-13-01",
            "2026-11-22 25:00",
            "2026-11-22 08",
            "2026-11-22 08:15 CST",
            "ago",
            " ago",
            "x minutes ago",
            "5 ago",
            "2026-11-22 08:15+99",
            "2026-11-22 08:15:00.",
            "2026-1-2",
            "20261122",
        ] {
            assert!(resolved(text).is_err(), "{text}: {:?}", resolved(text));
        }
    }
}
