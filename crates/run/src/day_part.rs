//! A part of the day, for `window` and for rates by the hour: the volume process reads rates, too.

pub use sprat_session::day_part::DayPart;
