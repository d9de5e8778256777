//! Small `.h5ad` files made on the spot, right or wrong in one chosen way.

#![allow(dead_code)] // not every test file uses all of it

use hdf5_pure::{AttrValue, FileBuilder};
use std::path::Path;

/// What goes into the file; change one field to break it.
#[derive(Clone)]
pub struct Spec {
    pub rows: i64,
    pub columns: i64,
    pub data: Vec<f32>,
    pub indices: Vec<i32>,
    pub indptr: Vec<i32>,
    pub encoding: &'static str,
    pub ids: Vec<String>,
    pub genes: Vec<String>,
    pub label: Option<(Vec<&'static str>, Vec<i8>)>,
    pub chunk: u64,
}

impl Spec {
    /// Two cells, three genes.
    pub fn small() -> Spec {
        Spec {
            rows: 2,
            columns: 3,
            data: vec![2.0, 1.0, 5.0, 4.0],
            indices: vec![0, 2, 0, 1],
            indptr: vec![0, 2, 4],
            encoding: "csr_matrix",
            ids: vec!["a".into(), "b".into()],
            genes: (1..4).map(|g| format!("ENSG{g:011}")).collect(),
            label: Some((vec!["x", "y"], vec![0, -1])),
            chunk: 0,
        }
    }

    /// From (row, column, count) triples in row order.
    pub fn csr(rows: usize, columns: usize, entries: &[(usize, usize, f32)]) -> Spec {
        let mut indptr = vec![0i32; rows + 1];
        entries.iter().for_each(|e| indptr[e.0 + 1] += 1);
        (0..rows).for_each(|r| indptr[r + 1] += indptr[r]);
        Spec {
            rows: rows as i64,
            columns: columns as i64,
            data: entries.iter().map(|e| e.2).collect(),
            indices: entries.iter().map(|e| e.1 as i32).collect(),
            indptr,
            ids: (0..rows).map(|r| format!("c{r}")).collect(),
            genes: (0..columns).map(|g| format!("ENSG{g:011}")).collect(),
            label: None,
            chunk: 1000,
            ..Spec::small()
        }
    }

    /// The same matrix by columns.
    pub fn csc(rows: usize, columns: usize, entries: &[(usize, usize, f32)]) -> Spec {
        let mut turned: Vec<(usize, usize, f32)> = entries.iter().map(|e| (e.1, e.0, e.2)).collect();
        turned.sort_by_key(|e| (e.0, e.1));
        let by_column = Spec::csr(columns, rows, &turned);
        Spec {
            rows: rows as i64,
            columns: columns as i64,
            encoding: "csc_matrix",
            ids: by_column.genes.clone(),
            genes: by_column.ids.clone(),
            ..by_column
        }
        .renamed(rows, columns)
    }

    fn renamed(mut self, rows: usize, columns: usize) -> Spec {
        self.ids = (0..rows).map(|r| format!("c{r}")).collect();
        self.genes = (0..columns).map(|g| format!("ENSG{g:011}")).collect();
        self
    }

    pub fn write(&self, path: &Path) {
        let mut file = FileBuilder::new();
        let text = |s: &str| AttrValue::VarLenString(s.into());
        let mut x = file.create_group("X");
        x.set_attr("encoding-type", text(self.encoding));
        x.set_attr("shape", AttrValue::I64Array(vec![self.rows, self.columns]));
        let chunk = |n: usize| self.chunk.min(n as u64);
        let data = x.create_dataset("data").with_f32_data(&self.data);
        if chunk(self.data.len()) > 0 {
            data.with_chunks(&[chunk(self.data.len())]).with_deflate(4);
        }
        let indices = x.create_dataset("indices").with_i32_data(&self.indices);
        if chunk(self.indices.len()) > 0 {
            indices.with_chunks(&[chunk(self.indices.len())]).with_deflate(4);
        }
        x.create_dataset("indptr").with_i32_data(&self.indptr);
        file.add_group(x.finish());
        self.frames(&mut file);
        file.write(path).unwrap();
    }

    /// The same cells as a dense matrix of `rows × columns`.
    pub fn write_dense(&self, path: &Path, dense: &[f32]) {
        let mut file = FileBuilder::new();
        let x = file.create_dataset("X").with_f32_data(dense);
        x.with_shape(&[self.rows as u64, self.columns as u64]).with_chunks(&[64, 64]).with_deflate(1);
        self.frames(&mut file);
        file.write(path).unwrap();
    }

    fn frames(&self, file: &mut FileBuilder) {
        let text = |s: &str| AttrValue::VarLenString(s.into());
        for (slot, names) in [("obs", &self.ids), ("var", &self.genes)] {
            let mut group = file.create_group(slot);
            group.set_attr("_index", text("_index"));
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            group.create_dataset("_index").with_vlen_strings(&names);
            if let (Some((categories, codes)), "obs") = (&self.label, slot) {
                let mut label = group.create_group("label");
                label.set_attr("encoding-type", text("categorical"));
                label.create_dataset("categories").with_vlen_strings(categories);
                label.create_dataset("codes").with_i8_data(codes);
                group.add_group(label.finish());
            }
            file.add_group(group.finish());
        }
    }
}
