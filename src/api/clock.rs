//! The calendar, as far as answers and templates need it (UTC).

use jiff::fmt::strtime::{BrokenDownTime, Config};
use jiff::{Timestamp, tz::TimeZone};

/// Seconds since 1970.
pub fn now() -> u64 {
    Timestamp::now().as_second().unsigned_abs()
}

/// `2024-01-31T09:05:00Z`.
pub fn rfc3339(seconds: u64) -> String {
    timestamp(seconds).to_string()
}

/// Python's `strftime` in the C locale; a directive that is not known stays as it is. (Known are also some that Python lacks, such as `%Q`.)
pub fn strftime(seconds: u64, format: &str) -> String {
    let time = timestamp(seconds).to_zoned(TimeZone::UTC);
    let mut text = String::new();
    let written = BrokenDownTime::from(&time).format_with_config(&Config::new().lenient(true), format, &mut text);
    if written.is_ok() { text } else { format.to_owned() }
}

/// The last second of the year 9999 for all that come after it.
fn timestamp(seconds: u64) -> Timestamp {
    i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok()).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_709_210_096), "2024-02-29T12:34:56Z");
        assert_eq!(rfc3339(4_102_444_799), "2099-12-31T23:59:59Z");
        assert_eq!(strftime(1_709_210_096, "%d %b %Y, %A %-I%p day %j, 100%%"), "29 Feb 2024, Thursday 12PM day 060, 100%");
        assert_eq!(strftime(0, "%J%"), "%J%");
    }
}
