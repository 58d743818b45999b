//! Compresses a piece unit by unit. Pure, and done on whatever thread has time.

use super::Rules;
use crate::Result;
use crate::block::is_zero;
use crate::buffer::Buffer;
use crate::qcow2::{Encoder, Stream};
use crate::units::GuestOffset;

/// What is stored as one.
pub(super) struct Unit {
    pub(super) at: GuestOffset,
    pub(super) bytes: Buffer,
    pub(super) form: Form,
}

/// How a unit is stored.
pub(super) enum Form {
    /// Compressed, where that made it smaller.
    Encoded(Option<Stream>),
    /// As it is, for it is no whole unit of the target.
    Plain,
    /// Not at all: it is zeros.
    Zero,
}

/// Compresses what lies at `start`, which is aligned to a unit.
pub(super) fn encode(
    mut bytes: Buffer,
    start: GuestOffset,
    rules: &Rules,
    encoder: Encoder,
) -> Result<Vec<Unit>> {
    let unit_bytes = encoder.unit_bytes() as usize;
    let (mut units, mut at) = (Vec::new(), start);
    while !bytes.is_empty() {
        let rest = bytes.split_off(unit_bytes.min(bytes.len()));
        let form = form(&bytes, rules, encoder)?;
        let len = bytes.len() as u64;
        units.push(Unit { at, bytes, form });
        (bytes, at) = (rest, at + len);
    }
    Ok(units)
}

fn form(bytes: &[u8], rules: &Rules, encoder: Encoder) -> Result<Form> {
    if !rules.writes_everything() && is_zero(bytes) {
        return Ok(Form::Zero);
    }
    // A rest of the source that is no rest of the target is no unit.
    match bytes.len() as u64 == encoder.unit_bytes() || rules.same_size {
        true => Ok(Form::Encoded(encoder.encode(bytes)?)),
        false => Ok(Form::Plain),
    }
}
