use super::*;
use crate::error::Kind;

fn small() -> Vocab {
    let token = ["<pad>", "<mask>", "ENSG00000000003", "ENSG00000000005", "ENSG00000000007"];
    let symbol = ["", "", "A|X", "B|A", "X"];
    Vocab::from_parts(
        token.map(str::to_string).to_vec(),
        vec![0.0, 0.0, 2.001186019549122, 1.0 / 3.0, 5e-324],
        symbol.map(str::to_string).to_vec(),
    )
    .unwrap()
}

#[test]
fn a_saved_vocabulary_reads_back_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("V.tsv");
    let vocab = small();
    vocab.save(&path, &["a note\nof two lines".into()]).unwrap();
    let back = Vocab::load(&path).unwrap();
    assert_eq!(back.tokens(), vocab.tokens());
    assert!(back.medians().iter().zip(vocab.medians()).all(|(a, b)| a.to_bits() == b.to_bits()));
    assert_eq!((back.digest(), back.symbol(2)), (vocab.digest(), Some("A")));
    assert_eq!(back.specials(), Specials { pad: 0, mask: 1, cls: None, eos: None });
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
}

#[test]
fn names_resolve_by_token_version_symbol_and_case() {
    let v = small();
    assert_eq!(v.resolve("ensg00000000003.17"), Match::One(2));
    assert_eq!(v.resolve(" ENSG00000000005 "), Match::One(3));
    assert_eq!(v.resolve("A"), Match::One(2), "the usual symbol goes before an alias");
    assert_eq!(v.resolve("b"), Match::One(3));
    assert_eq!(v.resolve("X"), Match::One(4));
    assert_eq!(v.resolve("<mask>"), Match::Unknown);
    assert_eq!(v.resolve("nothing"), Match::Unknown);
}

#[test]
fn an_ambiguous_symbol_names_its_tokens() {
    let token = ["<pad>", "<mask>", "g1", "g2"].map(str::to_string).to_vec();
    let v =
        Vocab::from_parts(token, vec![0.0, 0.0, 1.0, 1.0], ["", "", "S", "S"].map(str::to_string).to_vec())
            .unwrap();
    assert_eq!(v.by_symbol("S"), Match::Ambiguous(&[2, 3]));
}

#[test]
fn the_digest_sees_names_order_and_median_bits_but_not_symbols() {
    let v = small();
    let change = |f: &dyn Fn(&mut Vec<String>, &mut Vec<f64>)| {
        let (mut t, mut m) = (v.tokens().to_vec(), v.medians().to_vec());
        f(&mut t, &mut m);
        Vocab::from_parts(t, m, Vec::new()).unwrap().digest().to_string()
    };
    assert_eq!(change(&|_, _| ()), v.digest());
    assert_ne!(change(&|t, _| t.swap(2, 3)), v.digest());
    assert_ne!(change(&|_, m| m[2] = f64::from_bits(m[2].to_bits() + 1)), v.digest());
}

#[test]
fn broken_files_are_refused_with_the_line() {
    let good = small().to_tsv(&[]);
    let row = |from: &str, to: &str| good.replace(from, to);
    let cases = [
        (String::new(), ":1"),
        ("token\tid\n".to_string(), ":1"),
        (row("vocabulary 1", "vocabulary 9"), ":1"),
        (row("token\tid\tmedian", "gene\tid\tmedian"), ":3"),
        (row("\t3\t", "\t4\t"), ":7"),
        (row("\t2.001186019549122", "\tmuch"), ":6"),
        (row("\t2.001186019549122", "\t-2"), "token id 2"),
        (row("\t2.001186019549122", "\tNaN"), "token id 2"),
        (row("\t2.001186019549122", "\t2.5"), "digest"),
        (row("<mask>", "<musk>"), "<mask>"),
        (good[..good.len() - 6].to_string(), ":8"),
    ];
    for (text, needle) in cases {
        let e = Vocab::parse(&text, Path::new("V.tsv")).unwrap_err();
        assert_eq!(e.kind(), Kind::Input);
        assert!(e.to_string().contains(needle), "{needle} not in: {e}");
    }
}
