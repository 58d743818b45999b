//! Option strings, sizes, image options, requests to a control socket and rules of test drivers,
//! mutated from the fuzzer's corpus: parsers never panic.

use std::path::Path;

const PIECES: [&str; 20] = [
    ",", ",,", "=", "0x", ".", "-", "no", "k", "E", "é", "\0", " ", "{", "}", "[", "\n", "\"",
    "null", "help", "99999999",
];

/// A small generator of which only reproducibility is asked (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// Reads the corpus, which is what the fuzzer starts from as well.
fn seeds(target: &str) -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no seeds in {}", folder.display());
    paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect()
}

fn mutated(seeds: &[String], dice: &mut Dice) -> String {
    let mut text: Vec<char> = seeds[dice.below(seeds.len())].chars().collect();
    for _ in 0..=dice.below(6) {
        let at = dice.below(text.len() + 1);
        match dice.below(3) {
            0 => drop(text.splice(at..at, PIECES[dice.below(PIECES.len())].chars())),
            1 if at < text.len() => drop(text.remove(at)),
            _ => text.truncate(at.max(1)),
        }
    }
    text.into_iter().collect()
}

fn mutate(target: &str, parse: fn(&str)) {
    let seed = 0x1ac0_7a5e_ed00_0001;
    println!("seed {seed:#x}");
    let mut dice = Dice(seed);
    let seeds = seeds(target);
    for text in &seeds {
        parse(text);
    }
    for _ in 0..50_000 {
        parse(&mutated(&seeds, &mut dice));
    }
}

#[test]
fn parsers_stand_mutated_text() {
    mutate("option_strings", lacuna_cli::parse_hostile);
}

#[test]
fn control_requests_stand_mutated_text() {
    mutate("control_request", |line| lacuna_cli::parse_hostile_request(line.as_bytes()));
}

#[test]
fn rules_of_test_drivers_stand_mutated_text() {
    mutate("debug_rules", lacuna_cli::parse_hostile_rules);
}
