//! The keys that are checked and have no effect yet. Who gives one its effect takes it off the list.

/// Table and key. `config check` warns of each that is set.
const NOT_IN_EFFECT: &[(&str, &[&str])] = &[];

/// Begins the warning about a key without effect.
pub(super) const NOT_YET: &str = "not yet in effect";

/// Whether a key of a kind of table has no effect yet.
pub(super) fn is_without_effect(kind: &str, key: &str) -> bool {
    let mut of_kind = NOT_IN_EFFECT.iter().filter(|(table, _)| *table == kind);
    of_kind.any(|(_, keys)| keys.contains(&key))
}
