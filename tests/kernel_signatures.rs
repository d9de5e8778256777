//! The reader of kernel signatures (`build/signature.rs`): what it accepts, and that every refusal names its line.

#[path = "../build/signature.rs"]
mod signature;

use signature::{Kind, Scalar, parse};

const GOOD: &str = r#"
// a comment with extern "C" __global__ void not_a_kernel(int x)
#include "common.cuh"
#define LOOP(x) \
    for (;;) x
struct KERNEL_ARGUMENT Hyper {
  float rate;  // per step
  unsigned long long seed;
  unsigned int step;
};
struct Private { act_t* pointers_are_fine_here; };
DEVICE float f(const float* x) { return *x; }
extern "C" __global__ void __launch_bounds__(2 * WARP, 4) first(
    const act_t* __restrict__ x,  // (N, D)
    act_t* OPTIONAL y,  // (N, D) += where present
    const unsigned char* kept /* (N) */, unsigned flags,
    Hyper hyper, int n, float eps, double* sums  // (blocks)
    ) {
  const char* text = "extern \"C\" __global__ void nor_this()";
}
extern "C" __global__ void second() {}
"#;

#[test]
fn a_signature_is_read_in_full() {
    let found = parse(GOOD).unwrap();
    let names: Vec<&str> = found.kernels.iter().map(|k| k.name.as_str()).collect();
    assert_eq!(names, ["first", "second"]);
    let first = &found.kernels[0];
    assert_eq!(first.line, 13);
    assert_eq!(first.max_threads.as_deref(), Some("2 * WARP"));
    assert!(first.uses_act() && !found.kernels[1].uses_act());
    let pointer = |element, mutable, optional| Kind::Pointer { element, mutable, optional };
    let want = [
        ("x", pointer(Scalar::Act, false, false), Some("(N, D)")),
        ("y", pointer(Scalar::Act, true, true), Some("(N, D) += where present")),
        ("kept", pointer(Scalar::U8, false, false), Some("(N)")),
        ("flags", Kind::Value(Scalar::U32), None),
        ("hyper", Kind::Struct("Hyper".into()), None),
        ("n", Kind::Value(Scalar::I32), None),
        ("eps", Kind::Value(Scalar::F32), None),
        ("sums", pointer(Scalar::F64, true, false), Some("(blocks)")),
    ];
    assert_eq!(first.parameters.len(), want.len());
    for (got, (name, kind, shape)) in first.parameters.iter().zip(want) {
        assert_eq!((got.name.as_str(), &got.kind, got.shape.as_deref()), (name, &kind, shape));
    }
    assert!(found.kernels[1].parameters.is_empty());
    let [hyper] = &found.arguments[..] else { panic!("one struct") };
    assert_eq!((hyper.name.as_str(), hyper.line), ("Hyper", 6));
    assert_eq!(hyper.fields.iter().map(|f| f.1).collect::<Vec<_>>(), [Scalar::F32, Scalar::U64, Scalar::U32]);
}

#[test]
fn every_scalar_has_the_same_size_on_both_sides() {
    let sizes: [(Scalar, &str, usize); 9] = [
        (Scalar::F32, "float", size_of::<f32>()),
        (Scalar::F64, "double", size_of::<f64>()),
        (Scalar::I32, "int", size_of::<i32>()),
        (Scalar::U32, "unsigned", size_of::<u32>()),
        (Scalar::I64, "long long", size_of::<i64>()),
        (Scalar::U64, "unsigned long long", size_of::<u64>()),
        (Scalar::U16, "unsigned short", size_of::<u16>()),
        (Scalar::U8, "unsigned char", size_of::<u8>()),
        (Scalar::Bf16, "__nv_bfloat16", size_of::<half::bf16>()),
    ];
    for (scalar, cuda, bytes) in sizes {
        assert_eq!(scalar.cuda(), cuda);
        let digits: String = scalar.rust().chars().filter(char::is_ascii_digit).collect();
        assert_eq!(digits.parse::<usize>().unwrap(), 8 * bytes, "{}", scalar.rust());
    }
}

#[track_caller]
fn refused(source: &str, line: usize, why: &str) {
    let failure = parse(source).expect_err("refused");
    assert!(failure.line == line && failure.message.contains(why), "{failure}");
}

#[test]
fn a_refusal_names_the_line_and_the_reason() {
    refused("\n__global__ void k(int n) {}", 2, "extern \"C\"");
    refused("extern \"C\" __global__ int k(int n) {}", 1, "does not return void");
    refused("\n\nextern \"C\" __global__ void k(\n  float* x, int n) {}", 3, "no shape beside pointer `x`");
}

#[test]
fn unknown_types_and_forms_are_refused() {
    refused("extern \"C\" __global__ void k(\n  int a,\n  long n[3]) {}", 3, "no kernel parameter");
    refused("extern \"C\" __global__ void k(\n  int a,\n  long double n) {}", 3, "no counterpart");
    refused("extern \"C\" __global__ void k(\n  half* x) {}", 2, "no counterpart");
    refused("extern \"C\" __global__ void k(float& x) {}", 1, "no kernel parameter");
    refused("extern \"C\" __global__ void k(int) {}", 1, "has no type");
    refused("extern \"C\" __global__ void k(int OPTIONAL n) {}", 1, "OPTIONAL is for pointers");
    refused("extern \"C\" __global__ void k(int n", 1, "without");
    refused("/* no end", 1, "comment without end");
    refused("struct KERNEL_ARGUMENT S {\n  act_t x;\n};", 2, "no number of fixed size");
    refused("struct KERNEL_ARGUMENT S {\n  float x\n};", 3, "wanted `;`");
    refused("#define K(n) extern \"C\" __global__ void n()", 1, "made by a macro");
}
