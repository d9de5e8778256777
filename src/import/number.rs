//! Numbers as files store them, decoded to what this crate computes with: f64 for values, i64 for indices and codes.

/// A number's storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NumberType {
    /// Kind.
    pub kind: NumberKind,
    /// 1, 2, 4 or 8.
    pub bytes: usize,
    /// Stored with the most significant byte first.
    pub big_endian: bool,
}

/// Kinds of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberKind {
    /// IEEE binary16, 32 or 64.
    Float,
    /// Two's complement.
    Signed,
    /// Unsigned.
    Unsigned,
    /// h5py's boolean: an enumeration over one byte.
    Bool,
}

impl NumberType {
    /// Appends every element as f64. Integers beyond 2^53 are rounded, as everywhere in this field.
    pub fn decode_f64(self, raw: &[u8], out: &mut Vec<f64>) {
        macro_rules! decode {
            ($t:ty, $n:literal) => {
                if self.big_endian {
                    out.extend(
                        raw.chunks_exact($n)
                            .map(|b| <$t>::from_be_bytes(b.try_into().expect("n bytes")) as f64),
                    )
                } else {
                    out.extend(
                        raw.chunks_exact($n)
                            .map(|b| <$t>::from_le_bytes(b.try_into().expect("n bytes")) as f64),
                    )
                }
            };
        }
        use NumberKind as K;
        match (self.kind, self.bytes) {
            (K::Float, 4) => decode!(f32, 4),
            (K::Float, 8) => decode!(f64, 8),
            (K::Float, _) => out.extend(raw.chunks_exact(2).map(|b| {
                let bits = if self.big_endian {
                    u16::from_be_bytes([b[0], b[1]])
                } else {
                    u16::from_le_bytes([b[0], b[1]])
                };
                f64::from(half::f16::from_bits(bits))
            })),
            (K::Signed, 1) => decode!(i8, 1),
            (K::Signed, 2) => decode!(i16, 2),
            (K::Signed, 4) => decode!(i32, 4),
            (K::Signed, _) => decode!(i64, 8),
            (K::Unsigned | K::Bool, 1) => decode!(u8, 1),
            (K::Unsigned | K::Bool, 2) => decode!(u16, 2),
            (K::Unsigned | K::Bool, 4) => decode!(u32, 4),
            (K::Unsigned | K::Bool, _) => decode!(u64, 8),
        }
    }

    /// Appends every element as i64; unsigned values beyond it become `i64::MAX`, which no index check passes. Floats are not
    /// integers: `None`.
    pub fn decode_i64(self, raw: &[u8], out: &mut Vec<i64>) -> Option<()> {
        macro_rules! decode {
            ($t:ty, $n:literal) => {{
                let one = |b: &[u8]| {
                    let b = b.try_into().expect("n bytes");
                    let v = if self.big_endian { <$t>::from_be_bytes(b) } else { <$t>::from_le_bytes(b) };
                    i64::try_from(v).unwrap_or(i64::MAX)
                };
                out.extend(raw.chunks_exact($n).map(one))
            }};
        }
        use NumberKind as K;
        match (self.kind, self.bytes) {
            (K::Float, _) => return None,
            (K::Signed, 1) => decode!(i8, 1),
            (K::Signed, 2) => decode!(i16, 2),
            (K::Signed, 4) => decode!(i32, 4),
            (K::Signed, _) => decode!(i64, 8),
            (K::Unsigned | K::Bool, 1) => decode!(u8, 1),
            (K::Unsigned | K::Bool, 2) => decode!(u16, 2),
            (K::Unsigned | K::Bool, 4) => decode!(u32, 4),
            (K::Unsigned | K::Bool, _) => decode!(u64, 8),
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_storage_decodes_to_the_same_numbers() {
        use NumberKind as K;
        let f64s = |kind, bytes, big_endian, raw: &[u8]| {
            let mut out = Vec::new();
            NumberType { kind, bytes, big_endian }.decode_f64(raw, &mut out);
            out
        };
        assert_eq!(f64s(K::Float, 2, false, &[0x00, 0x3c, 0x00, 0xc0]), [1.0, -2.0]);
        assert_eq!(f64s(K::Float, 2, true, &[0x3c, 0x00]), [1.0]);
        assert_eq!(f64s(K::Float, 4, true, &1.5f32.to_be_bytes()), [1.5]);
        assert_eq!(f64s(K::Float, 8, false, &(-0.1f64).to_le_bytes()), [-0.1]);
        assert_eq!(f64s(K::Signed, 1, false, &[0xff, 0x7f]), [-1.0, 127.0]);
        assert_eq!(f64s(K::Unsigned, 1, false, &[0xff, 0x7f]), [255.0, 127.0]);
        assert_eq!(f64s(K::Signed, 2, true, &[0xff, 0xfe]), [-2.0]);
        assert_eq!(f64s(K::Unsigned, 8, false, &u64::MAX.to_le_bytes()), [u64::MAX as f64]);
        let i64s = |kind, bytes, big_endian, raw: &[u8]| {
            let mut out = Vec::new();
            NumberType { kind, bytes, big_endian }.decode_i64(raw, &mut out).map(|()| out)
        };
        assert_eq!(i64s(K::Signed, 4, true, &(-3i32).to_be_bytes()), Some(vec![-3]));
        assert_eq!(i64s(K::Unsigned, 8, false, &u64::MAX.to_le_bytes()), Some(vec![i64::MAX]));
        assert_eq!(i64s(K::Unsigned, 4, false, &u32::MAX.to_le_bytes()), Some(vec![i64::from(u32::MAX)]));
        assert_eq!(i64s(K::Float, 4, false, &[0; 4]), None);
    }
}
