//! The Gregorian calendar: seconds since 1970 and civil dates, proleptic, UTC.
//!
//! Days are counted from 1 March of year 0, so that the leap day is a year's last; 400 years are 146,097 days.

/// Seconds in a day.
pub(crate) const DAY: i64 = 86_400;
const DAYS_OF_400_YEARS: i64 = 146_097;
/// Days from 1 March of year 0 to 1 January 1970.
const EPOCH: i64 = 719_468;

/// A date and time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Civil {
    pub year: i64,
    /// 1 to 12.
    pub month: i64,
    /// 1 to 31.
    pub day: i64,
    /// 0 is Sunday.
    pub weekday: i64,
    pub hour: i64,
    pub minute: i64,
    pub second: i64,
}

impl Civil {
    pub fn from_seconds(seconds: i64) -> Self {
        let (days, time) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let since = days + EPOCH;
        let era = since.div_euclid(DAYS_OF_400_YEARS);
        let day_of_era = since.rem_euclid(DAYS_OF_400_YEARS);
        let leaps = day_of_era / 1_460 - day_of_era / 36_524 + day_of_era / 146_096;
        let year_of_era = (day_of_era - leaps) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Months from March on: 0 to 11.
        let shifted = (5 * day_of_year + 2) / 153;
        let month = if shifted < 10 {
            shifted + 3
        } else {
            shifted - 9
        };
        Civil {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted + 2) / 5 + 1,
            weekday: (days + 4).rem_euclid(7),
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    /// Fields out of range count on into the next higher one; the weekday is ignored.
    pub fn to_seconds(self) -> i64 {
        let month = self.month - 3;
        let year = self.year + month.div_euclid(12);
        let shifted = month.rem_euclid(12);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let day_of_year = (153 * shifted + 2) / 5 + self.day - 1;
        let day_of_era = 365 * year_of_era + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * DAYS_OF_400_YEARS + day_of_era - EPOCH;
        days * DAY + self.hour * 3600 + self.minute * 60 + self.second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates_come_out_right() {
        for (seconds, (year, month, day, weekday), (hour, minute, second)) in [
            (0, (1970, 1, 1, 4), (0, 0, 0)),
            (951_782_399, (2000, 2, 28, 1), (23, 59, 59)),
            (951_782_400, (2000, 2, 29, 2), (0, 0, 0)),
            (1_000_000_000, (2001, 9, 9, 0), (1, 46, 40)),
            (4_107_542_400, (2100, 3, 1, 1), (0, 0, 0)),
            (-1, (1969, 12, 31, 3), (23, 59, 59)),
        ] {
            let civil = Civil {
                year,
                month,
                day,
                weekday,
                hour,
                minute,
                second,
            };
            assert_eq!(Civil::from_seconds(seconds), civil);
            assert_eq!(civil.to_seconds(), seconds);
        }
    }

    #[test]
    fn every_day_of_800_years_goes_there_and_back() {
        let mut yesterday = Civil::from_seconds(-DAY);
        for day in 0..292_194 {
            let civil = Civil::from_seconds(day * DAY);
            assert_eq!(civil.to_seconds(), day * DAY);
            assert_eq!(civil.weekday, (yesterday.weekday + 1) % 7);
            assert!(civil.day == yesterday.day + 1 || civil.day == 1);
            yesterday = civil;
        }
    }

    #[test]
    fn a_month_too_many_is_next_year() {
        let mut civil = Civil::from_seconds(0);
        civil.month = 13;
        assert_eq!(Civil::from_seconds(civil.to_seconds()).year, 1971);
        civil.month = 0;
        assert_eq!(Civil::from_seconds(civil.to_seconds()).month, 12);
    }
}
