//! Seeded chance: the same seed draws the same numbers.

/// A small generator (SplitMix64, Steele et al. 2014); not for secrets.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// Starts from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.any() % end
    }

    /// True in `percent` of 100 throws.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// The number in an environment variable.
#[must_use]
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The seed of this run, which is printed. `SPRAT_TORTURE_SEED` names one. Without it the short form always draws
/// the same, so that a run fails by what was changed and not by chance; the long form, which
/// `SPRAT_TORTURE_ROUNDS` asks for, draws differently each time.
#[must_use]
pub fn seed() -> u64 {
    match number("SPRAT_TORTURE_ROUNDS") {
        Some(_) => new_seed(),
        None => named_or(2026),
    }
}

/// The same for a fuzzer: the short form, too, draws differently each time. It looks for what nobody thought of.
#[must_use]
pub fn new_seed() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed();
    let now = since.map_or(0, |since| u64::from(since.subsec_nanos()));
    named_or(u64::from(std::process::id()) << 32 | now)
}

#[expect(
    clippy::print_stdout,
    reason = "the test harness shows it where the test fails"
)]
fn named_or(drawn: u64) -> u64 {
    let seed = number("SPRAT_TORTURE_SEED").unwrap_or(drawn);
    println!("seed {seed}; SPRAT_TORTURE_SEED={seed} repeats this run");
    seed
}
