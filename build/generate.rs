//! Writes, from the declarations, what both sides of a launch need: Rust's typed functions, and the emulator's entry points.

use crate::signature::{Argument, Kernel, Kind, Parameter};
use std::fmt::Write;
use std::path::PathBuf;

/// A kernel file with what it declares.
pub struct File {
    /// `layernorm` of `kernels/layernorm.cu`.
    pub stem: String,
    pub kernels: Vec<Kernel>,
    /// Compiled for both activation types; otherwise for f32 alone.
    pub both_acts: bool,
    /// `*_sm90.cu`: for compute capability 9.0 alone (`sm_90a`), and for bf16 alone.
    pub hopper: bool,
    pub source: PathBuf,
    /// Everything that is written for it exists in this crate's own test build alone.
    pub test_only: bool,
}

/// Static library of the emulated kernels that are for tests alone.
pub const TEST_ARCHIVE: &str = "cellrefine_test_kernels";

/// Argument that the driver writes; `src/cuda/tensor_map.rs`.
pub const TENSOR_MAP: &str = "TensorMap";

/// Activation types in the order of every two-element table.
pub const ACTS: [&str; 2] = ["f32", "bf16"];

impl File {
    pub fn acts(&self) -> &'static [&'static str] {
        match (self.hopper, self.both_acts) {
            (true, _) => &ACTS[1..],
            (false, true) => &ACTS,
            (false, false) => &ACTS[..1],
        }
    }
    fn condition(&self) -> &'static str {
        if self.test_only { "#[cfg(test)]\n" } else { "" }
    }
}

/// `LayernormForward` of `layernorm_forward`.
fn camel(name: &str) -> String {
    name.split('_')
        .map(|word| {
            let mut c = word.chars();
            c.next().map_or(String::new(), |first| first.to_ascii_uppercase().to_string() + c.as_str())
        })
        .collect()
}

/// The name, or its raw form where Rust reserves it.
fn rust_name(name: &str) -> String {
    const RESERVED: [&str; 12] =
        ["in", "type", "ref", "move", "match", "loop", "fn", "use", "where", "mod", "box", "yield"];
    if RESERVED.contains(&name) { format!("r#{name}") } else { name.into() }
}

fn rust_type(p: &Parameter) -> String {
    match &p.kind {
        Kind::Pointer { element, mutable, optional } => {
            let reference = format!("&{}Buf<{}>", if *mutable { "mut " } else { "" }, element.rust());
            if *optional { format!("Option<{reference}>") } else { reference }
        }
        Kind::Value(scalar) => scalar.rust().into(),
        Kind::Struct(name) => name.clone(),
    }
}

/// The contents of `kernels.rs`: the kernel table, the argument structs, and one launch function per kernel.
/// `compiled`: is there a GPU image of a file?
pub fn rust(
    files: &[File],
    arguments: &[Argument],
    compiled: &dyn Fn(&File) -> bool,
    emulator: bool,
) -> String {
    let mut out = String::from("// Written by build.rs from the kernels' signatures.\n\n");
    let all = || files.iter().enumerate().flat_map(|(i, f)| f.kernels.iter().map(move |k| (i, f, k)));
    let _ = writeln!(out, "/// Every kernel, in the order of `KERNELS`.");
    let _ = writeln!(out, "#[derive(Debug, Clone, Copy, PartialEq, Eq)]\npub enum Kernel {{");
    for (_, f, k) in all() {
        let _ =
            writeln!(out, "    /// `{}.cu:{}`.\n    {}{},", f.stem, k.line, f.condition(), camel(&k.name));
    }
    let _ = writeln!(out, "}}\n");

    if emulator {
        for test_only in [false, true] {
            if test_only {
                let _ = writeln!(out, "#[cfg(test)]\n#[link(name = \"{TEST_ARCHIVE}\", kind = \"static\")]");
            }
            let _ = writeln!(out, "unsafe extern \"C\" {{");
            for (_, f, k) in all().filter(|(_, f, _)| f.test_only == test_only) {
                for act in f.acts() {
                    let _ = writeln!(out, "    static cellrefine_{act}_{}: EmulatedKernel;", k.name);
                }
            }
            let _ = writeln!(out, "}}\n");
        }
    }
    let _ = writeln!(
        out,
        "/// Name, place and entry points of every kernel.\npub(crate) static KERNELS: &[KernelEntry] = &["
    );
    for (i, f, k) in all() {
        let entry = |act: &str| match (emulator, f.acts().contains(&act)) {
            // SAFETY of the address alone: it is not read here.
            (true, true) => format!("Some(Entry(&raw const cellrefine_{act}_{}))", k.name),
            _ => "None".into(),
        };
        let _ = writeln!(
            out,
            "    {}KernelEntry {{ name: \"{}\", file: \"{}\", line: {}, image: {i}, hopper: {}, emulated: [{}, {}] }},",
            f.condition(),
            k.name,
            f.stem,
            k.line,
            f.hopper,
            entry("f32"),
            entry("bf16")
        );
    }
    let _ = writeln!(out, "];\n");

    let _ = writeln!(out, "/// GPU code per kernel file: f32, bf16. Absent without nvcc at build time.");
    let _ = writeln!(out, "pub(crate) static IMAGES: &[[Option<&[u8]>; 2]] = &[");
    for f in files {
        let image = |act: &str| {
            if compiled(f) && f.acts().contains(&act) {
                format!("Some(include_bytes!(\"{}_{act}.fatbin\"))", f.stem)
            } else {
                "None".into()
            }
        };
        let _ = writeln!(out, "    {}[{}, {}],", f.condition(), image("f32"), image("bf16"));
    }
    let _ = writeln!(out, "];\n");

    for a in arguments {
        let _ = writeln!(out, "/// The struct of the same name in `kernels/`.");
        let _ =
            writeln!(out, "#[repr(C)]\n#[derive(Debug, Clone, Copy, PartialEq)]\npub struct {} {{", a.name);
        for (field, scalar) in &a.fields {
            let _ =
                writeln!(out, "    /// See `kernels/`.\n    pub {}: {},", rust_name(field), scalar.rust());
        }
        let _ = writeln!(out, "}}\n");
    }
    for (_, f, k) in all() {
        launch_function(&mut out, f, k);
    }
    out
}

fn launch_function(out: &mut String, file: &File, k: &Kernel) {
    let _ = writeln!(out, "/// Launches `{}` of `{}.cu:{}`.\n///", k.name, file.stem, k.line);
    for p in &k.parameters {
        if let Some(shape) = &p.shape {
            let _ = writeln!(out, "/// - `{}`: {}", p.name, shape.replace('[', "\\[").replace(']', "\\]"));
        }
    }
    let _ = writeln!(out, "///\n/// # Errors\n/// A refused or failed launch.");
    let _ = writeln!(out, "#[allow(clippy::too_many_arguments)] // a kernel's argument list");
    let generic = if k.uses_act() { "<A: Act>" } else { "" };
    let act = match (k.uses_act(), file.hopper) {
        (true, _) => "act_index::<A>()",
        (false, true) => "1",
        (false, false) => "0",
    };
    let _ = writeln!(
        out,
        "{}pub(crate) fn {}{generic}(\n    cuda: &Cuda,\n    grid: Grid,",
        file.condition(),
        rust_name(&k.name)
    );
    for p in &k.parameters {
        let _ = writeln!(out, "    {}: {},", rust_name(&p.name), rust_type(p));
    }
    let _ = writeln!(out, ") -> Result<()> {{");
    for p in &k.parameters {
        let name = rust_name(&p.name);
        match &p.kind {
            Kind::Pointer { optional: true, .. } => {
                let _ = writeln!(out, "    let {name}: u64 = {name}.map_or(0, |b| b.address());");
            }
            Kind::Pointer { .. } => {
                let _ = writeln!(out, "    let {name}: u64 = {name}.address();");
            }
            _ => {}
        }
    }
    let _ = writeln!(out, "    let arguments: [*mut c_void; {}] = [", k.parameters.len());
    for p in &k.parameters {
        let _ = writeln!(out, "        (&raw const {}).cast_mut().cast(),", rust_name(&p.name));
    }
    let _ = writeln!(out, "    ];");
    let _ = writeln!(
        out,
        "    // SAFETY: one pointer per parameter, each to a live value of the very type, all from one declaration; the"
    );
    let _ = writeln!(
        out,
        "    // buffers are borrowed as the kernel uses them and hold what the op's checks asked for."
    );
    let _ = writeln!(
        out,
        "    unsafe {{ cuda.driver().launch(Kernel::{}, {act}, grid, &arguments, &{:?}) }}",
        camel(&k.name),
        sizes(k)
    );
    let _ = writeln!(out, "}}\n");
}

/// Bytes of each argument, for a recorded launch that copies them; a struct's is asked of Rust.
fn sizes(k: &Kernel) -> Raw {
    let size = |p: &Parameter| match &p.kind {
        Kind::Pointer { .. } => "8".to_string(),
        Kind::Value(s) => format!("size_of::<{}>()", s.rust()),
        Kind::Struct(name) => format!("size_of::<{name}>()"),
    };
    Raw(format!("[{}]", k.parameters.iter().map(size).collect::<Vec<_>>().join(", ")))
}

/// Text that prints as it is.
struct Raw(String);
impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The host C++ of one kernel file for one activation type: the file itself in a namespace of its own, then per kernel an
/// entry that unpacks the argument list.
pub fn cpp(file: &File, act: &str) -> String {
    let mut out = String::from(
        "// Written by build.rs from the kernels' signatures.\n#include \"emulator/cuda_host.h\"\n",
    );
    let _ = writeln!(out, "#define ACT_{}", act.to_uppercase());
    for k in &file.kernels {
        // The same C name would stand in both activation types' objects.
        let _ = writeln!(out, "#define {0} {0}_{act}", k.name);
    }
    let _ = writeln!(out, "namespace {}_{act} {{\n#include \"{}.cu\"", file.stem, file.stem);
    for k in &file.kernels {
        let arguments: Vec<String> = k
            .parameters
            .iter()
            .enumerate()
            .map(|(i, p)| match &p.kind {
                Kind::Pointer { element, mutable, .. } => {
                    let constant = if *mutable { "" } else { "const " };
                    format!("*static_cast<{constant}{}* const*>(a[{i}])", element.cuda())
                }
                Kind::Value(s) => format!("*static_cast<const {}*>(a[{i}])", s.cuda()),
                Kind::Struct(name) => format!("*static_cast<const {name}*>(a[{i}])"),
            })
            .collect();
        let unnamed = if k.parameters.is_empty() { "" } else { "a" };
        let _ = writeln!(
            out,
            "static void call_{}(void* const* {unnamed}) {{\n  {}({});\n}}",
            k.name,
            k.name,
            arguments.join(",\n    ")
        );
        let _ = writeln!(
            out,
            "enum {{ max_threads_of_{} = ({}) }};",
            k.name,
            k.max_threads.as_deref().unwrap_or("0")
        );
    }
    let _ = writeln!(out, "}}\nextern \"C\" {{");
    for k in &file.kernels {
        let symbol = format!("cellrefine_{act}_{}", k.name);
        let space = format!("{}_{act}", file.stem);
        let _ = writeln!(out, "#undef {}", k.name);
        let _ =
            writeln!(out, "extern __attribute__((visibility(\"default\"))) const cuhost::Kernel {symbol};");
        let _ = writeln!(
            out,
            "const cuhost::Kernel {symbol} = {{{space}::call_{0}, cuhost::run, {space}::max_threads_of_{0}}};",
            k.name
        );
    }
    let _ = writeln!(out, "}}");
    out
}
