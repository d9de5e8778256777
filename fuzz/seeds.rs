//! Writes the valid sample of every kind where cargo-fuzz looks for first inputs: `corpus/KIND/FILE`, beside this file.

#[path = "../tests/faults_inputs/kinds.rs"]
mod kinds;

fn main() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for kind in kinds::KINDS {
        let folder = corpus.join(kind.name);
        std::fs::create_dir_all(&folder).unwrap();
        for (name, bytes) in kinds::seeds(kind) {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
    }
}
