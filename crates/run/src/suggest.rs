//! Suggests the word that the user probably meant.

/// The candidate nearest to `word`, if the difference can be a typing error.
pub fn near_miss<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, candidate)| {
            *distance <= (candidate.len() / 3).max(1) || candidate.starts_with(word)
        })
        .min()
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_slip_of_the_finger_is_taken_for_a_word() {
        let words = ["exclude", "exclude_from", "sources", "container"];
        assert_eq!(near_miss("exlude", words), Some("exclude"));
        assert_eq!(near_miss("source", words), Some("sources"));
        assert_eq!(near_miss("keep_daily", words), None);
    }
}
