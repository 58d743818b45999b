//! Which meta contexts a query means (proto.md, "Metadata querying").
//!
//! * Always: a context is chosen at most once, in the order of the export, and by its whole name.
//! * A query that ends in a colon lists what begins with it, and chooses nothing.
//! * Never: a query for a namespace or a name that is not there is an error.

use crate::context::{Context, StatusWidth};

/// Returns the contexts that `queries` choose.
pub(super) fn chosen<'a>(
    contexts: &'a [Context],
    queries: &'a [String],
    width: StatusWidth,
) -> impl Iterator<Item = &'a Context> {
    offered(contexts, width).filter(|context| queries.contains(&context.name))
}

/// Returns the contexts that `queries` list: all of them if there is no query.
pub(super) fn listed<'a>(
    contexts: &'a [Context],
    queries: Option<&'a [String]>,
    width: StatusWidth,
) -> impl Iterator<Item = &'a Context> {
    let matches = |query: &String, name: &str| {
        query == name || query.ends_with(':') && name.starts_with(query.as_str())
    };
    offered(contexts, width).filter(move |context| {
        queries.is_none_or(|queries| queries.iter().any(|query| matches(query, &context.name)))
    })
}

/// Leaves out what is wider than the replies of this connection.
fn offered(contexts: &[Context], width: StatusWidth) -> impl Iterator<Item = &Context> {
    contexts
        .iter()
        .filter(move |context| width == StatusWidth::Bits64 || context.width == StatusWidth::Bits32)
}
