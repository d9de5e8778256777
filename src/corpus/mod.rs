//! (module corpus)
