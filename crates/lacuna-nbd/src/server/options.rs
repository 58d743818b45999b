//! What the data of an option says. Pure: bytes in, a checked value or the reason why not out.

use smallvec::SmallVec;

use crate::ExportName;
use crate::text::MAX_TEXT_BYTES;
use crate::wire::{Fields, InfoType};

/// The data of `INFO` and `GO`: u32 length, name, u16 count, that many u16.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InfoRequest {
    pub(super) name: ExportName,
    /// In the order of the client; what we do not know among it.
    pub(super) wanted: SmallVec<[InfoType; 8]>,
}

impl InfoRequest {
    pub(super) fn decode(data: &[u8]) -> Result<Self, String> {
        let mut fields = Fields(data);
        let name = export_name(&mut fields)?;
        let count = fields.u16().ok_or("The number of information requests is missing")?;
        let left = fields.len();
        if left != usize::from(count).saturating_mul(2) {
            return Err(format!("{count} information requests do not take {left} bytes"));
        }
        let wanted = std::iter::from_fn(|| fields.u16()).map(InfoType).collect();
        Ok(Self { name, wanted })
    }

    pub(super) fn wants(&self, info: InfoType) -> bool {
        self.wanted.contains(&info)
    }
}

/// The data of the options about meta contexts: u32 length, name, u32 count, that many queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ContextRequest {
    pub(super) name: ExportName,
    /// What is no UTF-8 text cannot name a context and is left out; `count` has it.
    pub(super) queries: Vec<String>,
    pub(super) count: u32,
}

impl ContextRequest {
    pub(super) fn decode(data: &[u8]) -> Result<Self, String> {
        let mut fields = Fields(data);
        let name = export_name(&mut fields)?;
        let count = fields.u32().ok_or("The number of queries is missing")?;
        let mut queries = Vec::new();
        for index in 0..count {
            // Ends with the data, whatever the count says.
            let query = fields.counted().ok_or_else(|| {
                format!("Query {index} of {count} reaches past the end of the option")
            })?;
            if query.len() > MAX_TEXT_BYTES {
                return Err(format!(
                    "Query {index} has {} bytes; at most {MAX_TEXT_BYTES} are allowed",
                    query.len()
                ));
            }
            queries.extend(std::str::from_utf8(query).map(str::to_owned));
        }
        if !fields.is_empty() {
            return Err(format!("{} bytes follow the last query", fields.len()));
        }
        Ok(Self { name, queries, count })
    }
}

fn export_name(fields: &mut Fields<'_>) -> Result<ExportName, String> {
    let name = fields.counted().ok_or("The name reaches past the end of the option")?;
    ExportName::decode(name).ok_or_else(|| wrong_name(name))
}

/// Says what is wrong with a name.
pub(super) fn wrong_name(name: &[u8]) -> String {
    format!(
        "Export name of {} bytes; a name is UTF-8 text without NUL of at most {MAX_TEXT_BYTES} \
         bytes",
        name.len()
    )
}
