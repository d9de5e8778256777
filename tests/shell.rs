//! What the program generates from its own flags: completions and manual pages. And `doctor`, as the first thing somebody reads.

use assert_cmd::Command;

#[track_caller]
fn output(args: &[&str]) -> String {
    let out = Command::cargo_bin("cellrefine").unwrap().args(args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The commands that `--help` lists.
fn commands(help: &str) -> Vec<String> {
    let list = help.split("Commands:\n").nth(1).unwrap_or("").split("\n\n").next().unwrap_or("");
    let names = list.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   "));
    names.filter_map(|l| l.split_whitespace().next()).filter(|n| *n != "help").map(String::from).collect()
}

#[test]
fn every_shell_completes_every_command_and_its_flags() {
    let commands = commands(&output(&["--help"]));
    assert!(commands.len() >= 18, "{commands:?}");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = output(&["completions", shell]);
        let absent: Vec<_> = commands.iter().filter(|c| !script.contains(c.as_str())).collect();
        assert!(absent.is_empty(), "{shell}: {absent:?}");
        assert!(script.contains("labels-per-class") && script.contains("h5ad"), "{shell}");
    }
    let bash = output(&["completions", "bash"]);
    let checked = std::process::Command::new("bash").args(["-n", "-c", &bash]).status();
    assert!(checked.is_ok_and(|s| s.success()), "bash does not read its completions");
}

#[test]
fn every_command_has_its_page() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("man1");
    output(&["man", "--out", &out.display().to_string()]);
    let mut wanted = vec!["cellrefine".to_string()];
    for command in commands(&output(&["--help"])) {
        let below = commands(&output(&[&command, "--help"]));
        wanted.extend(below.iter().map(|c| format!("cellrefine-{command}-{c}")));
        wanted.push(format!("cellrefine-{command}"));
    }
    for name in &wanted {
        let page =
            std::fs::read_to_string(out.join(format!("{name}.1"))).unwrap_or_else(|e| panic!("{name}: {e}"));
        let roff = name.replace('-', "\\-");
        assert!(page.contains(&format!(".SH NAME\n{roff} \\- ")) && page.contains(".SH OPTIONS"), "{name}");
    }
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), wanted.len());
}

#[test]
fn doctor_ends_with_commands_that_exist() {
    let text = output(&["doctor"]);
    let known = commands(&output(&["--help"]));
    let next = text.split("\nNext\n").nth(1).expect("a section of next steps");
    let named: Vec<&str> =
        next.lines().filter_map(|l| l.trim().strip_prefix("cellrefine ")?.split(' ').next()).collect();
    assert!(named.len() >= 4 && named.iter().all(|n| known.iter().any(|k| k == n)), "{named:?} of {known:?}");
    assert!(text.contains("Runs here") && text.contains("threads"));
}
