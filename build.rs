//! Walks `kernels/`: reads every kernel's signature, writes the typed launch functions from it, compiles GPU code where nvcc
//! is, and always compiles the same kernels as host C++ for the emulator. `kernels/` is the one declaration of a launch: a
//! change there that Rust does not follow is a compile error. `tests/toy_kernel/` goes the same way, into this crate's own test
//! build alone: the example of docs/kernels.md.

#[path = "build/cache.rs"]
mod cache;
#[path = "build/generate.rs"]
mod generate;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/signature.rs"]
mod signature;

use cache::{Job, digest};
use generate::File;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    if let Err(message) = build() {
        // The text itself, not its debug form: it is a compiler's report.
        eprintln!("\n{message}\n");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("run by cargo only")?);
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("run by cargo only")?);
    let kernels = root.join("kernels");
    for variable in nvcc::VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // A path that is not there counts as changed, and would build everything again at every call of cargo: scripts/cuda-toolkit.sh
    // touches this file when it brings the compiler.
    for path in ["build.rs", "build", "kernels", ".cuda/nvidia/cu13/bin/nvcc"] {
        if root.join(path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let mut folders = vec![kernels.clone()];
    let toy = root.join("tests/toy_kernel");
    if toy.is_dir() {
        println!("cargo::rerun-if-changed=tests/toy_kernel");
        folders.push(toy);
    }
    println!("cargo::rustc-check-cfg=cfg(emulator)");

    let (files, arguments) = read(&folders)?;
    let headers = headers(&kernels)?;
    let mut jobs = Vec::new();

    let nvcc = nvcc::find(&root);
    match &nvcc {
        Some(nvcc) => {
            let (gpu, archs) = nvcc.jobs(&files, &kernels, headers, &out)?;
            jobs.extend(gpu);
            println!("cargo::rustc-env=BUILT_WITH_NVCC={}", nvcc.release());
            println!("cargo::rustc-env=BUILT_FOR_ARCHS={archs}");
        }
        None => {
            println!("cargo::rustc-env=BUILT_WITH_NVCC=");
            println!("cargo::rustc-env=BUILT_FOR_ARCHS=");
            println!(
                "cargo::warning=no nvcc: built without GPU code (cpu and emulated are complete); \
                 scripts/cuda-toolkit.sh installs one"
            );
        }
    }

    let target = |name: &str| env::var(name).unwrap_or_default();
    let emulator = target("CARGO_CFG_TARGET_OS") == "linux"
        && ["x86_64", "aarch64"].contains(&target("CARGO_CFG_TARGET_ARCH").as_str());
    let mut objects = Vec::new();
    if emulator {
        println!("cargo::rustc-cfg=emulator");
        let host = emulator_jobs(&files, &kernels, headers, &out)?;
        objects = host.iter().map(|(test_only, j)| (*test_only, j.output.clone())).collect();
        jobs.extend(host.into_iter().map(|(_, job)| job));
    }
    cache::run(jobs)?;
    if emulator {
        let (toy, product): (Vec<_>, Vec<_>) = objects.into_iter().partition(|(test_only, _)| *test_only);
        let archive = |objects: Vec<(bool, PathBuf)>| {
            let mut archive = cc::Build::new();
            archive.cpp(true).cargo_warnings(false).objects(objects.into_iter().map(|(_, o)| o));
            archive
        };
        // Linked by an attribute in kernels.rs, in the test build alone.
        archive(toy).cargo_metadata(false).compile(generate::TEST_ARCHIVE);
        archive(product).compile("cellrefine_emulator");
    }
    let compiled = |file: &File| nvcc.as_ref().is_some_and(|nvcc| nvcc.compiles(file));
    write(&out.join("kernels.rs"), &generate::rust(&files, &arguments, &compiled, emulator))
}

/// All kernel files in order of folder and name, and the argument structs of files and headers. What is in a folder after the
/// first is for tests alone.
fn read(folders: &[PathBuf]) -> Result<(Vec<File>, Vec<signature::Argument>), String> {
    let (mut files, mut arguments) = (Vec::new(), Vec::new());
    let mut names: Vec<(String, PathBuf)> = Vec::new();
    let mut paths = Vec::new();
    for (i, folder) in folders.iter().enumerate() {
        paths.extend(sources(folder)?.into_iter().map(|path| (i > 0, path)));
    }
    for (test_only, path) in paths {
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let found = signature::parse(&text).map_err(|f| format!("{}:{f}", path.display()))?;
        arguments.extend(found.arguments);
        if path.extension().is_some_and(|e| e == "cuh") {
            continue;
        }
        for k in &found.kernels {
            if let Some((_, other)) = names.iter().find(|(name, _)| *name == k.name) {
                return Err(format!(
                    "{}:{}: kernel `{}` stands in {} too",
                    path.display(),
                    k.line,
                    k.name,
                    other.display()
                ));
            }
            names.push((k.name.clone(), path.clone()));
        }
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        files.push(File {
            both_acts: found.kernels.iter().any(signature::Kernel::uses_act),
            hopper: stem.ends_with("_sm90"),
            stem,
            kernels: found.kernels,
            source: path,
            test_only,
        });
    }
    for file in &files {
        for k in &file.kernels {
            for p in &k.parameters {
                if let signature::Kind::Struct(name) = &p.kind
                    && !arguments.iter().any(|a| a.name == *name)
                    && name != generate::TENSOR_MAP
                {
                    return Err(format!(
                        "kernels/{}.cu:{}: type `{name}` of `{}` has no counterpart in Rust: neither a number nor a \
                         struct KERNEL_ARGUMENT",
                        file.stem, k.line, p.name
                    ));
                }
            }
        }
    }
    Ok((files, arguments))
}

/// `kernels/*.cu` and `kernels/*.cuh`, in order of name.
fn sources(kernels: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(kernels).map_err(|e| format!("{}: {e}", kernels.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "cu" || e == "cuh"));
    paths.sort();
    Ok(paths)
}

/// A digest of every header, so that a change in one recompiles everything.
fn headers(kernels: &Path) -> Result<u64, String> {
    let mut paths = sources(kernels)?;
    paths.retain(|p| p.extension().is_some_and(|e| e == "cuh"));
    paths.extend(["runtime.h", "cuda_host.h"].map(|name| kernels.join("emulator").join(name)));
    let texts: Result<Vec<_>, String> =
        paths.iter().map(|p| fs::read(p).map_err(|e| format!("{}: {e}", p.display()))).collect();
    Ok(digest(texts?))
}

/// The emulator and every kernel as host C++: `$OUT_DIR/emulator/STEM_ACT.cpp`.
/// Each with the answer to: is it for tests alone?
fn emulator_jobs(
    files: &[File],
    kernels: &Path,
    headers: u64,
    out: &Path,
) -> Result<Vec<(bool, Job)>, String> {
    let folder = out.join("emulator");
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let compiler = cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(false)
        .flag("-fno-strict-aliasing")
        .flag_if_supported("-fstack-clash-protection") // a large frame must meet the guard page
        .flag_if_supported("-Wno-unknown-pragmas")
        .flag_if_supported("-Wno-unused-function")
        .flag_if_supported("-Wno-maybe-uninitialized") // g++ 12 takes what a loop sets for unset
        .cargo_metadata(false)
        .try_get_compiler()
        .map_err(|e| format!("the emulator needs a C++17 compiler (g++ or clang++): {e}"))?;
    let mut jobs = Vec::new();
    let mut add = |source: PathBuf, text: String, file: Option<&File>| -> Result<(), String> {
        let stem = source.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let output = folder.join(format!("{stem}.o"));
        let mut command = compiler.to_command();
        if let Some(folder) = file.filter(|f| f.test_only).and_then(|f| f.source.parent()) {
            command.arg("-I").arg(folder);
        }
        command.arg("-I").arg(kernels).arg("-c").arg(&source).arg("-o").arg(&output);
        let key = digest([format!("{command:?}"), text, headers.to_string()]);
        jobs.push((file.is_some_and(|f| f.test_only), Job { command, output, key, source }));
        Ok(())
    };
    let load = |path: &Path| fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()));
    for name in ["cuda_host.cpp", "fiber.cpp", "hopper.cpp"] {
        let path = kernels.join("emulator").join(name);
        let text = load(&path)?;
        add(path, text, None)?;
    }
    for file in files {
        let kernel = load(&file.source)?;
        for act in file.acts() {
            let source = folder.join(format!("{}_{act}.cpp", file.stem));
            let text = generate::cpp(file, act);
            write(&source, &text)?;
            add(source, text + &kernel, Some(file))?;
        }
    }
    Ok(jobs)
}

/// Writes only what differs, so that what depends on the file is not rebuilt for nothing.
fn write(path: &Path, text: &str) -> Result<(), String> {
    if fs::read_to_string(path).ok().as_deref() == Some(text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}
