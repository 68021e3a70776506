//! Words in reports: lists of them, how they stand in a sentence, and which of them a slip was meant to be. Pure.

/// Words in code quotes, with commas.
pub fn list(words: &[&str]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

/// For the middle of a sentence; abbreviations stay as they are.
pub fn lower_first(text: &str) -> String {
    let mut characters = text.chars();
    match (characters.next(), characters.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => first.to_lowercase().chain(characters).collect(),
        _ => text.to_owned(),
    }
}

/// The word among `known` that `given` is a slip of, if there is one.
pub fn did_you_mean<'w>(given: &str, known: &[&'w str]) -> Option<&'w str> {
    let bare = |word: &str| word.to_lowercase().replace(['-', ' ', '_'], "");
    let given_bare = bare(given);
    let allowed = (given_bare.chars().count() / 3).clamp(1, 3);
    let scored = known.iter().map(|word| (edit_distance(&given_bare, &bare(word)), *word));
    // Something of what was written must be left: `3` is no slip of `0`.
    let is_slip = |distance: usize| distance <= allowed && distance < given_bare.chars().count();
    scored.filter(|(distance, _)| is_slip(*distance)).min_by_key(|(distance, _)| *distance).map(|(_, word)| word)
}

/// Insertions, deletions, changes and swaps of neighbours that lead from `a` to `b` (optimal string alignment).
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for row in 1..=a.len() {
        let mut current = vec![row];
        for column in 1..=b.len() {
            let changed = usize::from(a[row - 1] != b[column - 1]);
            let mut best = (above[column] + 1).min(current[column - 1] + 1).min(above[column - 1] + changed);
            if row > 1 && column > 1 && a[row - 1] == b[column - 2] && a[row - 2] == b[column - 1] {
                best = best.min(before[column - 2] + 1);
            }
            current.push(best);
        }
        before = std::mem::replace(&mut above, current);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised_and_strangers_are_not() {
        let known = ["address", "max_connections", "tls", "name"];
        let check = |given: &str, expected| assert_eq!(did_you_mean(given, &known), expected, "{given}");
        check("adress", Some("address"));
        check("addresss", Some("address"));
        check("max-connections", Some("max_connections"));
        check("maxConnection", Some("max_connections"));
        check("tsl", Some("tls"));
        check("colour", None);
        check("", None);
    }
}
