//! Strict parse of the metadata.
