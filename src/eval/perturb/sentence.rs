//! One cell as the network reads it, and with genes taken out or put in front.

use crate::corpus::Corpus;
use crate::error::Result;
use half::f16;

/// What happens to the genes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Taken out of the cells that hold them.
    Delete,
    /// Put at the front of every cell.
    Overexpress,
}

/// Genes in rank order, special tokens not among them, cut to the context.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sentence {
    pub gene: Vec<u32>,
    /// One a gene, or none at all.
    pub value: Vec<f16>,
    room: usize,
}

impl Sentence {
    /// The first `room` genes of `cell`.
    pub fn of(corpus: &Corpus, cell: u32, room: usize) -> Result<Sentence> {
        let gene: Vec<u32> = corpus.genes(cell as usize)?.iter().take(room).collect();
        let value = corpus.values(cell as usize)?.map_or(Vec::new(), |v| v[..gene.len()].to_vec());
        Ok(Sentence { gene, value, room })
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.gene.len()
    }

    /// Would [`Sentence::perturbed`] give something?
    pub fn changes(&self, kind: Kind, genes: &[u32]) -> bool {
        match kind {
            Kind::Delete => {
                let left = self.gene.iter().filter(|g| !genes.contains(g)).count();
                left > 0 && left < self.len()
            }
            Kind::Overexpress => {
                let front = &genes[..genes.len().min(self.room)];
                !front.is_empty() && !self.gene.starts_with(front)
            }
        }
    }

    /// The cell with `genes` perturbed together; `None` where that changes nothing, or leaves nothing.
    pub fn perturbed(&self, kind: Kind, genes: &[u32]) -> Option<Sentence> {
        if !self.changes(kind, genes) {
            return None;
        }
        let (mut gene, mut value) = (Vec::with_capacity(self.len() + genes.len()), Vec::new());
        if kind == Kind::Overexpress {
            gene.extend_from_slice(genes);
            // As high as the highest gene that the cell has.
            let most = self.value.iter().copied().fold(f16::ZERO, f16::max);
            value.resize(if self.value.is_empty() { 0 } else { genes.len() }, most);
        }
        for (i, g) in self.gene.iter().enumerate().filter(|(_, g)| !genes.contains(g)) {
            gene.push(*g);
            value.extend(self.value.get(i));
        }
        gene.truncate(self.room);
        value.truncate(self.room);
        Some(Sentence { gene, value, room: self.room })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentence(gene: &[u32], room: usize) -> Sentence {
        let value = gene.iter().map(|g| f16::from_f32(*g as f32 / 10.0)).collect();
        Sentence { gene: gene.to_vec(), value, room }
    }

    #[test]
    fn deleting_closes_the_gap_and_nothing_else() {
        let s = sentence(&[5, 3, 9, 7], 4);
        let p = s.perturbed(Kind::Delete, &[3, 7, 100]).unwrap();
        assert_eq!(p, sentence(&[5, 9], 4));
        assert_eq!(s.perturbed(Kind::Delete, &[100]), None, "not in the cell");
        assert_eq!(s.perturbed(Kind::Delete, &[5, 3, 9, 7]), None, "nothing would be left");
    }

    #[test]
    fn overexpressing_moves_to_the_front_in_the_order_given_and_the_last_falls_off() {
        let s = sentence(&[5, 3, 9, 7], 4);
        let p = s.perturbed(Kind::Overexpress, &[9, 8]).unwrap();
        assert_eq!(p.gene, [9, 8, 5, 3]);
        assert_eq!(p.value, [0.9, 0.9, 0.5, 0.3].map(f16::from_f32));
        let roomy = sentence(&[5, 3, 9, 7], 10).perturbed(Kind::Overexpress, &[9, 8]).unwrap();
        assert_eq!(roomy.gene, [9, 8, 5, 3, 7]);
        assert_eq!(s.perturbed(Kind::Overexpress, &[5, 3]), None, "there already");
        let bare = Sentence { value: Vec::new(), ..s };
        assert!(bare.perturbed(Kind::Overexpress, &[7]).unwrap().value.is_empty());
    }
}
