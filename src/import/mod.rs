//! (module import)
