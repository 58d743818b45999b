//! What lacuna's tests share.
