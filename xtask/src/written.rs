//! What the command writes of itself, for those who make packages: manual pages, completions.

use crate::Outcome;
use crate::run::{cargo, run};

/// Lets the verb of the command write all that it makes into `target/VERB`.
pub(crate) fn by_the_command(verb: &str) -> Outcome {
    let folder = format!("target/{verb}");
    run(cargo(&["run", "--quiet", "-p", "lacuna-cli", "--", verb, "--all", &folder]))?;
    println!("{folder}");
    Ok(())
}
