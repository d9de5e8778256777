//! Where settings come from, and how one overrides another.
//!
//! Every source is flattened to assignments `a.b.c = value` that are laid, one at a time, over the table of the defaults.
//! The table of the defaults is the schema: it names the known keys and their types, so that the error can say which key was
//! meant and which type was wanted, and where the assignment stood.

use super::{Settings, Stage};
use crate::error::{Code, Error, Result, nearest};
use crate::model::ModelConfig;
use crate::whole_file;
use std::path::PathBuf;
use toml::{Table, Value};

/// What was said outside the program.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `--config FILE`.
    pub config: Option<PathBuf>,
    /// `CELLREFINE_*` variables.
    pub environment: Vec<(String, String)>,
    /// `--set a.b=c`, in order.
    pub set: Vec<String>,
    /// `--seed N`.
    pub seed: Option<u64>,
}

/// Settings are a page of text.
const MAX_BYTES: u64 = 1 << 20;
/// Variables that are no settings: flags of the command line, the build's, the emulator's, tests' faults.
const OTHER_VARIABLES: [&str; 11] = [
    "CELLREFINE_THREADS",
    "CELLREFINE_DEVICE",
    "CELLREFINE_SEED",
    "CELLREFINE_CUDA_ARCHS",
    "CELLREFINE_COMMIT",
    "CELLREFINE_LAUNCHED",
    crate::disk::fault::VARIABLE,
    crate::disk::fault::RECORD,
    "CELLREFINE_EMULATOR_SCHEDULE",
    "CELLREFINE_EMULATOR_LIBRARY",
    "CELLREFINE_EMULATOR_MEMORY",
];

/// One assignment and where it stood.
struct Assignment {
    path: Vec<String>,
    value: Value,
    /// Text without quotes and types (environment, --set), as opposed to TOML.
    loose: bool,
    place: String,
}

impl Sources {
    /// The sources of this process: `config` and `set` from the command line, the rest from the environment.
    pub fn of_process(config: Option<PathBuf>, set: Vec<String>, seed: Option<u64>) -> Sources {
        let mut environment: Vec<_> =
            std::env::vars().filter(|(name, _)| name.starts_with("CELLREFINE_")).collect();
        environment.sort();
        Sources { config, environment, set, seed }
    }

    /// The effective settings of `stage` for an encoder that starts as `model`.
    ///
    /// Learning rates depend on the width, which the sources may change: defaults are taken for the width that results.
    pub fn resolve(&self, stage: Stage, model: &ModelConfig) -> Result<Settings> {
        let assignments = self.assignments()?;
        let mut settings = apply(Settings::defaults(stage, model), &assignments)?;
        if settings.model.width != model.width {
            let wider = ModelConfig { width: settings.model.width, ..model.clone() };
            settings = apply(Settings::defaults(stage, &wider), &assignments)?;
        }
        if let Some(seed) = self.seed {
            settings.seed = seed;
        }
        settings.check().map_err(|e| {
            // Named by its setting: the last assignment to it is where it stands.
            let said = |a: &&Assignment| e.what().split(' ').any(|word| word == a.path.join("."));
            match assignments.iter().rev().find(said) {
                Some(assignment) => e.clone().at(&assignment.place),
                None => e,
            }
        })?;
        Ok(settings)
    }

    fn assignments(&self) -> Result<Vec<Assignment>> {
        let mut list = Vec::new();
        if let Some(file) = &self.config {
            let text = whole_file::read_text(file, "read the settings file", MAX_BYTES)?;
            let table: Table = text.parse().map_err(|e: toml::de::Error| {
                Error::new(Code::SettingsFile, "the settings file is not TOML")
                    .at(file.display())
                    .found(e.to_string().trim())
            })?;
            flatten(&table, &mut Vec::new(), &file.display().to_string(), &mut list);
        }
        for (name, text) in &self.environment {
            if OTHER_VARIABLES.contains(&name.as_str()) {
                continue;
            }
            let path = name["CELLREFINE_".len()..].to_lowercase().split("__").map(str::to_string).collect();
            list.push(Assignment { path, value: loose_value(text), loose: true, place: name.clone() });
        }
        for text in &self.set {
            let (key, value) = text.split_once('=').ok_or_else(|| {
                Error::new(Code::SettingValue, "--set wants KEY=VALUE")
                    .found(text)
                    .next("--set optimizer.learning_rate=1e-3")
            })?;
            let path = key.trim().split('.').map(str::to_string).collect();
            let value = loose_value(value.trim());
            list.push(Assignment { path, value, loose: true, place: format!("--set {text}") });
        }
        Ok(list)
    }
}

fn flatten(table: &Table, path: &mut Vec<String>, file: &str, list: &mut Vec<Assignment>) {
    for (key, value) in table {
        path.push(key.clone());
        match value {
            Value::Table(inner) => flatten(inner, path, file, list),
            leaf => list.push(Assignment {
                path: path.clone(),
                value: leaf.clone(),
                loose: false,
                place: format!("{file}:{}", path.join(".")),
            }),
        }
        path.pop();
    }
}

/// A TOML value where the text is one (`1e-3`, `true`, `[1, 2]`, `"x"`), otherwise the text itself.
fn loose_value(text: &str) -> Value {
    format!("value = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| if table.len() == 1 { table.remove("value") } else { None })
        .unwrap_or_else(|| Value::String(text.to_string()))
}

fn apply(defaults: Settings, assignments: &[Assignment]) -> Result<Settings> {
    let mut table =
        Table::try_from(&defaults).map_err(|e| Error::bug(format!("settings as a table: {e}")))?;
    let mut settings = defaults;
    for assignment in assignments {
        let known = assign(&mut table, assignment)?;
        settings = table.clone().try_into().map_err(|e: toml::de::Error| {
            if !known {
                return unknown(&settings, assignment);
            }
            Error::new(
                Code::SettingValue,
                format!("setting {} cannot have this value", assignment.path.join(".")),
            )
            .at(&assignment.place)
            .found(e.message())
        })?;
    }
    Ok(settings)
}

/// Puts the value in place. False where the table has no such key, so that only the deserialiser can tell whether it is
/// an optional setting without a default, or unknown.
fn assign(table: &mut Table, assignment: &Assignment) -> Result<bool> {
    let (last, sections) = assignment.path.split_last().expect("a path has a segment");
    let mut table = table;
    for section in sections {
        if !table.get(section).is_some_and(Value::is_table) {
            // No such section: a key with a dot in it is one that the deserialiser refuses.
            table.insert(assignment.path.join("."), assignment.value.clone());
            return Ok(false);
        }
        table = table.get_mut(section).and_then(Value::as_table_mut).expect("a section, as just seen");
    }
    let Some(old) = table.get(last) else {
        table.insert(last.clone(), assignment.value.clone());
        return Ok(false);
    };
    let value = coerce(old, assignment)?;
    table.insert(last.clone(), value);
    Ok(true)
}

/// The value in the type of the one it replaces.
fn coerce(old: &Value, assignment: &Assignment) -> Result<Value> {
    let value = &assignment.value;
    Ok(match (old, value) {
        (Value::Float(_), Value::Integer(i)) => Value::Float(*i as f64),
        // 0.5 tokens is a mistake, 1e4 tokens is not.
        (Value::Integer(_), Value::Float(f)) if assignment.loose && f.fract() == 0.0 && f.abs() < 9e15 => {
            Value::Integer(*f as i64)
        }
        (Value::String(_), v) if assignment.loose && !v.is_str() => Value::String(v.to_string()),
        (a, b) if std::mem::discriminant(a) == std::mem::discriminant(b) => b.clone(),
        (a, b) => {
            return Err(Error::new(
                Code::SettingValue,
                format!("setting {} has the wrong type", assignment.path.join(".")),
            )
            .at(&assignment.place)
            .found(format!("{b} ({})", b.type_str()))
            .wanted(format!("{} such as {a}", a.type_str())));
        }
    })
}

/// The error of an unknown key: the nearest key, by its last segment in any section, or by its whole path.
fn unknown(settings: &Settings, assignment: &Assignment) -> Error {
    let path = assignment.path.join(".");
    let mut known = Vec::new();
    if let Ok(table) = Table::try_from(settings) {
        let mut leaves = Vec::new();
        flatten(&table, &mut Vec::new(), "", &mut leaves);
        known = leaves.into_iter().map(|leaf| leaf.path.join(".")).collect();
    }
    let names: Vec<&str> = known.iter().map(String::as_str).collect();
    let last = assignment.path.last().expect("a path has a segment");
    let by_last = || {
        let ends: Vec<&str> = names.iter().map(|name| name.rsplit('.').next().unwrap_or(name)).collect();
        let end = nearest(last, ends.iter().copied())?;
        names.iter().copied().find(|name| name.rsplit('.').next() == Some(end))
    };
    let exact_last = || names.iter().copied().find(|name| name.rsplit('.').next() == Some(last.as_str()));
    let error = Error::new(Code::SettingUnknown, format!("unknown setting {path}")).at(&assignment.place);
    match exact_last().or_else(|| nearest(&path, names.iter().copied())).or_else(by_last) {
        Some(near) => error.next(format!("did you mean {near}?")),
        None => {
            let mut sections: Vec<&str> = names.iter().map(|n| n.split('.').next().unwrap_or(n)).collect();
            sections.dedup();
            error.wanted(format!("a key of {}", sections.join(", ")))
        }
    }
}
