//! The first 48 bytes of an HDF5 file, brought from layout version 0 to version 2.
//!
//! h5py, and with it anndata, writes version 0 by default. The editor holds such a file in memory whole; a version-2 file it
//! edits by positioned reads and writes, so a copy of 50 GB costs no more memory than one of 5 MB. Both versions say the same
//! (address widths, end of file, address of the root group); every object behind them stays where and as it is.
//!
//! ```text
//! version 0   \x89HDF\r\n\x1a\n | 0 … | 13: 8, 14: 8 | 16: K of leaves u16, 18: K of nodes u16 | 24: base | 40: end of file
//!             | 48: driver information | 64: root group
//! version 2   \x89HDF\r\n\x1a\n | 2, 8, 8, 0 | base | extension = none | end of file | root group | lookup3 of these 44 bytes
//! ```
//! Version 2 has no room for the two K: only a file with HDF5's defaults, as all are that nobody tuned, is converted.

const SIGNATURE: &[u8; 8] = b"\x89HDF\r\n\x1a\n";
const UNDEFINED: u64 = u64::MAX;

/// Bytes that [`modernised`] must see.
pub(super) const HEAD_BYTES: usize = 96;

/// The same superblock as version 2, padded with zeros to the room of the old one; `None` where it must stay as it is.
pub(super) fn modernised(head: &[u8; HEAD_BYTES]) -> Option<[u8; HEAD_BYTES]> {
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let u64_at = |at: usize| head[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or(UNDEFINED);
    let plain = head.starts_with(SIGNATURE)
        && head[8] == 0
        && (head[13], head[14]) == (8, 8)
        && (u16_at(16), u16_at(18)) == (4, 16)
        && u64_at(24) == 0
        && u64_at(48) == UNDEFINED;
    if !plain {
        return None;
    }
    let mut new = Vec::with_capacity(HEAD_BYTES);
    new.extend(SIGNATURE);
    new.extend([2, 8, 8, 0]);
    [0, UNDEFINED, u64_at(40), u64_at(64)].iter().for_each(|x| new.extend(x.to_le_bytes()));
    new.extend(lookup3(&new).to_le_bytes());
    new.resize(HEAD_BYTES, 0);
    new.try_into().ok()
}

/// Bob Jenkins' lookup3 (hashlittle, initial value 0), HDF5's checksum of metadata.
fn lookup3(bytes: &[u8]) -> u32 {
    let start = 0xdead_beef_u32.wrapping_add(bytes.len() as u32);
    let mut s = [start; 3];
    // The last 1 to 12 bytes go through the final mix instead.
    let whole = bytes.len().saturating_sub(1) / 12;
    let add = |s: &mut [u32; 3], block: &[u8]| {
        for (i, byte) in block.iter().enumerate() {
            s[i / 4] = s[i / 4].wrapping_add(u32::from(*byte) << (8 * (i % 4)));
        }
    };
    for block in bytes.chunks(12).take(whole) {
        add(&mut s, block);
        // (target, source, rotation): target −= source, target ^= source <<< rotation, source += the third word.
        for (t, f, by) in [(0, 2, 4), (1, 0, 6), (2, 1, 8), (0, 2, 16), (1, 0, 19), (2, 1, 4)] {
            s[t] = s[t].wrapping_sub(s[f]) ^ s[f].rotate_left(by);
            s[f] = s[f].wrapping_add(s[3 - t - f]);
        }
    }
    let rest = &bytes[12 * whole..];
    if rest.is_empty() {
        return s[2];
    }
    add(&mut s, rest);
    for (t, f, by) in [(2, 1, 14), (0, 2, 11), (1, 0, 25), (2, 1, 16), (0, 2, 4), (1, 0, 14), (2, 1, 24)] {
        s[t] = (s[t] ^ s[f]).wrapping_sub(s[f].rotate_left(by));
    }
    s[2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup3_gives_its_authors_values() {
        // From the self-test in lookup3.c, with both initial values 0.
        assert_eq!(lookup3(b""), 0xdead_beef);
        assert_eq!(lookup3(b"Four score and seven years ago"), 0x1777_0551);
    }

    #[test]
    fn only_a_plain_version_0_is_converted() {
        let mut head = [0u8; HEAD_BYTES];
        head[..8].copy_from_slice(SIGNATURE);
        (head[13], head[14], head[16], head[18]) = (8, 8, 4, 16);
        head[40..48].copy_from_slice(&4096u64.to_le_bytes());
        head[48..56].fill(0xff);
        head[64..72].copy_from_slice(&96u64.to_le_bytes());
        let new = modernised(&head).unwrap();
        assert_eq!(
            (new[8], &new[28..36], &new[36..44]),
            (2, &4096u64.to_le_bytes()[..], &96u64.to_le_bytes()[..])
        );
        assert!(new[48..].iter().all(|b| *b == 0));
        for (at, value) in [(0, 0), (8, 2), (13, 4), (16, 8), (18, 32), (24, 1), (48, 0)] {
            let mut other = head;
            other[at] = value;
            assert_eq!(modernised(&other), None, "byte {at}");
        }
    }
}
