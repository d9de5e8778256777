//! Do the tests of a kernel notice when the kernel is wrong, and are the sanitizers silent when it is right?
//!
//! `kernels/mutants/STEM.toml` lists one-line faults. Each is put into a copy of `kernels/`, compiled as host C++ into a shared
//! object, and given to this very test program by CELLREFINE_EMULATOR_LIBRARY: at least one schedule's tests have to fail. The
//! unchanged kernel goes the same way first, and has to pass, so that a mutant is caught for its fault and not for its journey.

use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    /// In `kernels/`; the kernel's own file unless it says otherwise.
    file: Option<String>,
    /// Text that stands there once.
    old: String,
    /// What stands there instead.
    new: String,
    /// What is wrong with it.
    fault: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutants {
    mutant: Vec<Mutant>,
}

/// A mutant that hangs is caught as well.
const PATIENCE: Duration = Duration::from_secs(120);
const SCHEDULES: [&str; 3] = ["late", "reversed", "eager"];

/// What the names of a module's tests start with: the path without the crate.
pub fn prefix(module: &str) -> String {
    module.split_once("::").map_or(String::new(), |(_, path)| format!("{path}::"))
}

/// Every mutant of kernel file `stem` fails a test whose name starts with `prefix` + `emulated_`.
pub fn each_is_caught(stem: &str, prefix: &str) {
    each_is_caught_in("kernels", "kernels/mutants", stem, prefix);
}

/// The same for a kernel in another folder, with its list in `lists`.
pub fn each_is_caught_in(folder: &str, lists: &str, stem: &str, prefix: &str) {
    let Some(compiler) = compiler() else {
        eprintln!("skipped: no C++ compiler (CXX, c++, g++, clang++) to build mutants with");
        return;
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (kernels, own) = (root.join("kernels"), root.join(folder));
    let list = root.join(lists).join(format!("{stem}.toml"));
    let list: Mutants = toml::from_str(&std::fs::read_to_string(list).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bench =
        Bench { compiler, kernels, own, folder: folder.path().into(), stem: stem.into(), sanitize: false };
    let runtime = bench.runtime();

    let control = bench.build("control", None, &runtime);
    for schedule in SCHEDULES {
        assert!(
            bench.passes(&control, prefix, schedule),
            "the unchanged kernel fails its tests ({schedule})"
        );
    }
    let next = AtomicUsize::new(0);
    let missed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some(mutant) = list.mutant.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let name = format!("mutant{}", next.load(Ordering::Relaxed));
                    let library = bench.build(&name, Some(mutant), &runtime);
                    if SCHEDULES.iter().all(|schedule| bench.passes(&library, prefix, schedule)) {
                        missed.lock().unwrap().push(mutant.fault.clone());
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "no test notices: {missed:#?}");
    assert!(list.mutant.len() >= 3, "{stem}: three mutants at least");
}

/// The kernel's tests pass in all schedules under AddressSanitizer and UndefinedBehaviorSanitizer.
pub fn sanitizers_are_silent(stem: &str, prefix: &str) {
    let compiler = compiler().expect("a C++ compiler with the sanitizers' libraries");
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let folder = tempfile::tempdir().unwrap();
    let (own, stem) = (kernels.clone(), stem.into());
    let bench = Bench { compiler, kernels, own, folder: folder.path().into(), stem, sanitize: true };
    let library = bench.build("sanitized", None, &bench.runtime());
    for schedule in SCHEDULES {
        let output = bench.command(&library, prefix, schedule).output().unwrap();
        assert!(
            output.status.success(),
            "{schedule}:\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

fn compiler() -> Option<String> {
    let named = std::env::var("CXX").ok();
    named
        .into_iter()
        .chain(["c++", "g++", "clang++"].map(String::from))
        .find(|program| Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success()))
}

struct Bench {
    compiler: String,
    kernels: PathBuf,
    /// Where the kernel file itself is.
    own: PathBuf,
    folder: PathBuf,
    stem: String,
    sanitize: bool,
}

impl Bench {
    fn compile(&self, arguments: &[&std::ffi::OsStr]) {
        let flags = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-w"];
        let mut command = Command::new(&self.compiler);
        command.args(flags);
        if self.sanitize {
            command.args(["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]);
        }
        let output = command.args(arguments).output().unwrap();
        assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The emulator's own objects, the same for all.
    fn runtime(&self) -> Vec<PathBuf> {
        ["cuda_host", "fiber", "hopper"]
            .map(|name| {
                let source = self.kernels.join("emulator").join(format!("{name}.cpp"));
                let object = self.folder.join(format!("{name}.o"));
                self.compile(&["-c".as_ref(), source.as_ref(), "-o".as_ref(), object.as_ref()]);
                object
            })
            .into()
    }

    /// The kernel file, mutated or not, as a shared object.
    fn build(&self, name: &str, mutant: Option<&Mutant>, runtime: &[PathBuf]) -> PathBuf {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        if let Some(mutant) = mutant {
            let (from, file) = match &mutant.file {
                Some(file) => (&self.kernels, file.clone()),
                None => (&self.own, format!("{}.cu", self.stem)),
            };
            let text = std::fs::read_to_string(from.join(&file)).unwrap();
            assert_eq!(text.matches(&mutant.old).count(), 1, "{file}: stands once: {:?}", mutant.old);
            // Headers include one another by their own folder, so all of them move with the mutated one.
            for entry in std::fs::read_dir(&self.kernels).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
                }
            }
            std::fs::write(folder.join(&file), text.replace(&mutant.old, &mutant.new)).unwrap();
        }
        let include = |path: &Path| {
            let mut flag = std::ffi::OsString::from("-I");
            flag.push(path);
            flag
        };
        let [mutated, own, original] = [&folder, &self.own, &self.kernels].map(|path| include(path));
        let mut objects = runtime.to_vec();
        for act in ["f32", "bf16"] {
            let source = Path::new(env!("OUT_DIR")).join("emulator").join(format!("{}_{act}.cpp", self.stem));
            if source.exists() {
                let object = folder.join(format!("{act}.o"));
                let io = ["-c".as_ref(), source.as_os_str(), "-o".as_ref(), object.as_ref()];
                self.compile(&[&[mutated.as_ref(), own.as_ref(), original.as_ref()], &io[..]].concat());
                objects.push(object);
            }
        }
        let library = folder.join("kernels.so");
        let mut link: Vec<&std::ffi::OsStr> = vec!["-shared".as_ref(), "-o".as_ref(), library.as_ref()];
        link.extend(objects.iter().map(|o| o.as_os_str()));
        self.compile(&link);
        library
    }

    /// This program's tests of one schedule, with the library's kernels.
    fn command(&self, library: &Path, prefix: &str, schedule: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([&format!("{prefix}emulated_{schedule}"), "--test-threads=1", "--quiet"])
            .env("CELLREFINE_EMULATOR_LIBRARY", library)
            .env("RUST_BACKTRACE", "0");
        if self.sanitize {
            // The sanitizer's own library has to come before everything else in a program that was built without it.
            let asan = Command::new(&self.compiler).arg("-print-file-name=libasan.so").output().unwrap();
            command
                .env("LD_PRELOAD", String::from_utf8(asan.stdout).unwrap().trim())
                .env("ASAN_OPTIONS", "detect_leaks=0");
        }
        command
    }

    /// Do they pass?
    fn passes(&self, library: &Path, prefix: &str, schedule: &str) -> bool {
        let mut command = self.command(library, prefix, schedule);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.success();
            }
            if start.elapsed() > PATIENCE {
                child.kill().unwrap();
                child.wait().unwrap();
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
