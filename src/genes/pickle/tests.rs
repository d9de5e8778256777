use super::*;

// Written by Python 3.11: pickle.dumps({"a": 1, "b": -70000, "c": 2.5, "d": "x"}, protocol=4).
const PLAIN: &[u8] = b"\x80\x04\x95\x29\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94K\x01\x8c\x01b\x94J\x90\xee\xfe\xff\x8c\x01c\x94G@\x04\x00\x00\x00\x00\x00\x00\x8c\x01d\x94\x8c\x01x\x94u.";

#[test]
fn a_plain_dictionary() {
    let d = read_dictionary(PLAIN).unwrap();
    let names: Vec<&str> = d.iter().map(|(k, _)| k.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "d"]);
    let values: Vec<Scalar> = d.into_iter().map(|(_, v)| v).collect();
    assert_eq!(values, [Scalar::Int(1), Scalar::Int(-70000), Scalar::Float(2.5), Scalar::Text("x".into())]);
}

#[test]
fn code_is_refused_by_name() {
    let e = read_dictionary(b"cos\nsystem\n(S'true'\ntR.").unwrap_err();
    assert!(e.contains("os.system"), "{e}");
    let e = read_dictionary(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.").unwrap_err();
    assert!(e.contains("builtins.eval"), "{e}");
}

#[test]
fn every_truncation_and_every_flipped_byte_ends_without_a_panic() {
    for n in 0..PLAIN.len() {
        assert!(read_dictionary(&PLAIN[..n]).is_err());
    }
    for i in 0..PLAIN.len() {
        for flip in [0x01, 0x10, 0x80, 0xff] {
            let mut bytes = PLAIN.to_vec();
            bytes[i] ^= flip;
            let _ = read_dictionary(&bytes);
        }
    }
}
