//! `state.json` speaks for every other file of a checkpoint, and its last line for itself: the SHA-256 of the whole text, taken
//! with zeros in the digest's place. A flipped bit in a step number is then noticed as one in the weights is.

use crate::digest::sha256;
use crate::error::{Code, Error, Result};
use serde_json::Value;
use std::path::Path;

/// What stands before and behind the digest.
const FIELD: &str = "\"sha256\": \"";
const END: &str = "\"\n}\n";
/// Hexadecimal digits of a digest.
const DIGITS: usize = 64;
/// A manifest lists a handful of files.
pub(super) const MAX_BYTES: u64 = 64 << 20;

/// The text of a manifest, sealed.
pub(super) fn text(mut manifest: Value) -> String {
    manifest["sha256"] = "0".repeat(DIGITS).into();
    let mut text = format!("{manifest:#}\n");
    let digest = sha256(text.as_bytes());
    let start = text.len() - END.len() - DIGITS;
    text.replace_range(start..start + DIGITS, &digest);
    text
}

/// Reads a manifest whose seal holds; `path` is named in errors.
///
/// # Errors
/// Input: no seal, or one that is of another text; not JSON.
pub(super) fn read(text: &str, path: &Path) -> Result<Value> {
    let damaged = |what: &str| {
        Error::new(Code::CheckpointDamaged, what)
            .at(path.display())
            .next("continue from an older one: --resume=auto")
    };
    let place = text
        .len()
        .checked_sub(END.len() + DIGITS)
        .filter(|&at| text.is_char_boundary(at) && text[..at].ends_with(FIELD) && text.ends_with(END));
    let start = place.ok_or_else(|| {
        damaged("the checkpoint's manifest is cut short or damaged").wanted("its own SHA-256 at its end")
    })?;
    let (head, found) = (&text[..start], &text[start..text.len() - END.len()]);
    let digest = sha256([head, &"0".repeat(DIGITS), END].concat().as_bytes());
    if found != digest {
        return Err(damaged("the checkpoint's manifest is damaged")
            .found(format!("SHA-256 {digest}"))
            .wanted(format!("{found}, as it says itself")));
    }
    serde_json::from_str(text).map_err(|e| damaged("the checkpoint's manifest is not JSON").found(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn no_byte_of_a_manifest_can_change() {
        let manifest = json!({"step": 7, "files": {"weights": {"bytes": 3, "sha256": "ab"}}, "ü": 0.1});
        let whole = text(manifest.clone());
        let mut found = read(&whole, Path::new("state.json")).unwrap();
        found.as_object_mut().unwrap().remove("sha256");
        assert_eq!(found, manifest);
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                // What is no UTF-8 any more does not come so far.
                let Ok(changed) = String::from_utf8(bytes) else { continue };
                let e = read(&changed, Path::new("state.json")).expect_err(&changed);
                assert_eq!(e.code(), Code::CheckpointDamaged);
            }
            assert!(!whole.is_char_boundary(at) || read(&whole[..at], Path::new("state.json")).is_err());
        }
    }
}
