//! Which names mean the same type: those of the label column, of a classifier, of prototypes and of marker sets.

/// Class index of each name: that of the equal label, or a new class behind the labels.
pub(super) fn class_of_names(names: &[String], labels: &[String], classes: &mut Vec<String>) -> Vec<usize> {
    names
        .iter()
        .map(|name| {
            labels.iter().position(|l| plain(l) == plain(name)).unwrap_or_else(|| {
                classes.iter().position(|c| c == name).unwrap_or_else(|| {
                    classes.push(name.clone());
                    classes.len() - 1
                })
            })
        })
        .collect()
}

/// Column of `label` among `names`: by the map, by equality, by letters and digits.
pub(super) fn column_of(label: &str, names: &[String], map: Option<&[(String, String)]>) -> Option<usize> {
    let position = |wanted: &str| names.iter().position(|n| n == wanted);
    let mapped = map.and_then(|m| m.iter().find(|(l, _)| l == label)).and_then(|(_, set)| position(set));
    mapped.or_else(|| position(label)).or_else(|| names.iter().position(|n| plain(n) == plain(label)))
}

/// Lower-case letters, digits and signs: `CD16+` is never `CD16-`.
fn plain(name: &str) -> String {
    name.to_lowercase().chars().filter(|c| c.is_alphanumeric() || matches!(c, '+' | '-')).collect()
}
