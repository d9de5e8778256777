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

// Written by Python 3.11 and numpy: pickle.dumps({"<pad>": np.int16(0), "a": np.int16(-2), "b": np.float64(2.5)}, protocol=2), with the
// module's name of numpy 1, which pickled Geneformer's V1 dictionaries.
const NUMPY: &[u8] = b"\x80\x02}q\x00(X\x05\x00\x00\x00<pad>q\x01cnumpy.core.multiarray\x0ascalar\x0aq\x02cnumpy\x0adtype\x0aq\x03X\x02\x00\x00\x00i2q\x04\x89\x88\x87q\x05Rq\x06(K\x03X\x01\x00\x00\x00<q\x07NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x08bc_codecs\x0aencode\x0aq\x09X\x02\x00\x00\x00\x00\x00q\x0aX\x06\x00\x00\x00latin1q\x0b\x86q\x0cRq\x0d\x86q\x0eRq\x0fX\x01\x00\x00\x00aq\x10h\x02h\x06h\x09X\x04\x00\x00\x00\xc3\xbe\xc3\xbfq\x11h\x0b\x86q\x12Rq\x13\x86q\x14Rq\x15X\x01\x00\x00\x00bq\x16h\x02h\x03X\x02\x00\x00\x00f8q\x17\x89\x88\x87q\x18Rq\x19(K\x03h\x07NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x1abh\x09X\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00\x04@q\x1bh\x0b\x86q\x1cRq\x1d\x86q\x1eRq\x1fu.";

#[test]
fn numpy_scalars_are_numbers() {
    let d = read_dictionary(NUMPY).unwrap();
    let values: Vec<Scalar> = d.into_iter().map(|(_, v)| v).collect();
    assert_eq!(values, [Scalar::Int(0), Scalar::Int(-2), Scalar::Float(2.5)]);
    for n in 0..NUMPY.len() {
        assert!(read_dictionary(&NUMPY[..n]).is_err());
        for flip in [0x01, 0x10, 0x80, 0xff] {
            let mut bytes = NUMPY.to_vec();
            bytes[n] ^= flip;
            let _ = read_dictionary(&bytes);
        }
    }
}

// Written by Python 3.11: d = {}; d["a"] = d; pickle.dumps(d, protocol=4).
const CYCLE: &[u8] = b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94h\x00s.";

#[test]
fn a_dictionary_in_itself_is_no_number() {
    let e = read_dictionary(CYCLE).unwrap_err();
    assert!(e.contains("but a dictionary"), "{e}");
}

/// One long string, remembered once and named again and again: two bytes of file for each copy.
#[test]
fn what_is_recalled_does_not_multiply_the_file() {
    let mut bomb = b"\x80\x02X\x00\x00\x01\x00".to_vec();
    bomb.extend([b'x'; 1 << 16]);
    bomb.extend(b"q\x00}(");
    (0..1 << 16).for_each(|_| bomb.extend(b"h\x00h\x00"));
    bomb.extend(b"u.");
    let e = read_dictionary(&bomb).unwrap_err();
    assert!(e.contains("more text than the file"), "{e}");
}

#[test]
fn one_byte_values_and_marks_are_counted() {
    let e = read_dictionary(&vec![b'N'; MAX_VALUES + 1]).unwrap_err();
    assert!(e.contains("too many values"), "{e}");
    let e = read_dictionary(&vec![b'('; MAX_MARKS + 1]).unwrap_err();
    assert!(e.contains("marks"), "{e}");
    let mut bytes = b"}".to_vec();
    bytes.extend(vec![0x94; MAX_VALUES + 1]);
    let e = read_dictionary(&bytes).unwrap_err();
    assert!(e.contains("too many values"), "{e}");
}
