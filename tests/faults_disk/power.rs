//! A file system after a power loss, made from the record of the operations before it.
//!
//! Folders and files are nodes. What a sync fixed is certain; behind it waits, per file, a list of writes and, per folder, a list of
//! changes to its names. A power loss keeps of each list what [`Loss`] says: of names a first part (the journal of a file system
//! is in order, but each folder's may end elsewhere), of writes any of them.

use cellrefine::disk::fault::Entry;
use cellrefine::rng::Philox;
use std::collections::BTreeMap;
use std::path::Path;

/// What of the unsynced is lost.
#[derive(Debug, Clone, Copy)]
pub enum Loss {
    /// All.
    Everything,
    /// All data, and no names: files of the right name and no content, as delayed allocation leaves them.
    Data,
    /// Of each file and each folder another part.
    Random(u64),
}

#[derive(Default)]
struct Node {
    folder: bool,
    data: Vec<u8>,
    writes: Vec<Write>,
    names: BTreeMap<String, usize>,
    changes: Vec<Change>,
}

enum Write {
    At(u64, Vec<u8>),
    Cut(u64),
}

enum Change {
    Add(String, usize),
    Remove(String),
    Rename(String, String, usize),
}

struct Disk {
    nodes: Vec<Node>,
}

/// Makes below `root` what is left after `record`; returns the newest step whose checkpoint the program had made durable.
pub fn replay(record: &[Entry], root: &Path, loss: Loss) -> u64 {
    let mut disk = Disk { nodes: vec![Node { folder: true, ..Node::default() }] };
    let inside = |path: &Path| -> Vec<String> {
        let path = path.strip_prefix(root).expect("all is written below one folder");
        path.iter().map(|name| name.to_string_lossy().into_owned()).collect()
    };
    let (mut published, mut promised) = (0, 0);
    for entry in record {
        match entry {
            Entry::Folder { path } => disk.add(&inside(path), true),
            Entry::File { path, bytes } => match disk.find(&inside(path)) {
                Some(node) => disk.nodes[node].writes.push(Write::Cut(*bytes)),
                None => disk.add(&inside(path), false),
            },
            Entry::Write { path, at, hex } => {
                let node = disk.find(&inside(path)).expect("a write to a file");
                disk.nodes[node].writes.push(Write::At(*at, bytes_of(hex)));
            }
            Entry::Cut { path, bytes } => {
                let node = disk.find(&inside(path)).expect("a file to cut");
                disk.nodes[node].writes.push(Write::Cut(*bytes));
            }
            Entry::Sync { path } => {
                let node = disk.find(&inside(path)).expect("a file to sync");
                let writes = std::mem::take(&mut disk.nodes[node].writes);
                writes.iter().for_each(|write| write.apply(&mut disk.nodes[node].data));
            }
            Entry::SyncFolder { path } => {
                let node = disk.find(&inside(path)).expect("a folder to sync");
                let changes = std::mem::take(&mut disk.nodes[node].changes);
                changes.iter().for_each(|change| change.apply(&mut disk.nodes[node].names));
                if path.ends_with("checkpoints") {
                    promised = published;
                }
            }
            Entry::Rename { from, to } => {
                let (from, to) = (inside(from), inside(to));
                assert_eq!(from[..from.len() - 1], to[..to.len() - 1], "renamed within a folder");
                let node = disk.find(&from).expect("something to rename");
                let (old, new) = (from[from.len() - 1].clone(), to[to.len() - 1].clone());
                if let Some(step) = new.strip_prefix("step-").and_then(|n| n.parse().ok()) {
                    published = step;
                }
                let parent = disk.find(&to[..to.len() - 1]).expect("its folder");
                disk.nodes[parent].changes.push(Change::Rename(old, new, node));
            }
            Entry::Link { from, to } => {
                let (node, to) = (disk.find(&inside(from)).expect("something to link"), inside(to));
                let parent = disk.find(&to[..to.len() - 1]).expect("its folder");
                disk.nodes[parent].changes.push(Change::Add(to[to.len() - 1].clone(), node));
            }
            Entry::Remove { path } => {
                let path = inside(path);
                let parent = disk.find(&path[..path.len() - 1]).expect("its folder");
                disk.nodes[parent].changes.push(Change::Remove(path[path.len() - 1].clone()));
            }
        }
    }
    let mut random = match loss {
        Loss::Random(seed) => Some(Philox::new(seed, 0, 26)),
        _ => None,
    };
    disk.leave(0, root, loss, &mut random);
    promised
}

impl Disk {
    /// As the program sees it: with all that is not synced yet.
    fn names(&self, folder: usize) -> BTreeMap<String, usize> {
        let mut names = self.nodes[folder].names.clone();
        self.nodes[folder].changes.iter().for_each(|change| change.apply(&mut names));
        names
    }
    fn find(&self, path: &[String]) -> Option<usize> {
        path.iter().try_fold(0, |folder, name| self.names(folder).get(name).copied())
    }
    fn add(&mut self, path: &[String], folder: bool) {
        let parent = self.find(&path[..path.len() - 1]).expect("a folder to make it in");
        let node = self.nodes.len();
        self.nodes.push(Node { folder, ..Node::default() });
        self.nodes[parent].changes.push(Change::Add(path[path.len() - 1].clone(), node));
    }
    /// Makes what is left of `folder` at `place`.
    fn leave(&self, folder: usize, place: &Path, loss: Loss, random: &mut Option<Philox>) {
        let node = &self.nodes[folder];
        let mut names = node.names.clone();
        let kept = match (loss, random.as_mut()) {
            (Loss::Data, _) => node.changes.len(),
            (_, Some(random)) => random.below(node.changes.len() as u64 + 1) as usize,
            _ => 0,
        };
        node.changes[..kept].iter().for_each(|change| change.apply(&mut names));
        for (name, node) in names {
            let path = place.join(name);
            let node = (&self.nodes[node], node);
            if node.0.folder {
                std::fs::create_dir_all(&path).unwrap();
                self.leave(node.1, &path, loss, random);
                continue;
            }
            let mut data = node.0.data.clone();
            if let Some(random) = random.as_mut() {
                node.0
                    .writes
                    .iter()
                    .filter(|_| random.below(2) == 1)
                    .for_each(|write| write.apply(&mut data));
            }
            std::fs::write(&path, data).unwrap();
        }
    }
}

impl Write {
    fn apply(&self, data: &mut Vec<u8>) {
        match self {
            Write::Cut(bytes) => data.resize(*bytes as usize, 0),
            Write::At(at, bytes) => {
                let end = *at as usize + bytes.len();
                data.resize(data.len().max(end), 0);
                data[*at as usize..end].copy_from_slice(bytes);
            }
        }
    }
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Change::Add(name, node) => {
                names.insert(name.clone(), *node);
            }
            Change::Remove(name) => {
                names.remove(name);
            }
            Change::Rename(old, new, node) => {
                names.remove(old);
                names.insert(new.clone(), *node);
            }
        }
    }
}

fn bytes_of(hex: &str) -> Vec<u8> {
    let digit = |c: u8| (c as char).to_digit(16).expect("hexadecimal") as u8;
    hex.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) * 16 + digit(pair[1])).collect()
}
