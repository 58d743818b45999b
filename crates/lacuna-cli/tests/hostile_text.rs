//! Option strings, sizes and image options, mutated from seeds: parsers never panic.

const SEEDS: [&str; 12] = [
    "cluster_size=64k,size=1.5G,lazy_refcounts,compat=v3",
    "data_file=a,,b,data_file_raw=on,refcount_bits=0x10",
    "size=0x7fffffffffffffff",
    "nolazy_refcounts,extended_l2=yes,compression_type=zstd",
    "driver=qcow2,file.filename=a,,b,file.driver=file",
    "{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a\"}}",
    "9223372036854775807",
    "18446744073709551615E",
    "0.99999999999999999999999999k",
    "help,?,size=1M",
    ",,,=,==,,no,nono=",
    "size=-1,refcount_bits=-0777777777777777777777777",
];
const PIECES: [&str; 16] =
    [",", ",,", "=", "0x", ".", "-", "no", "k", "E", "é", "\0", " ", "{", "\"", "help", "99999999"];

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

fn mutated(dice: &mut Dice) -> String {
    let mut text: Vec<char> = SEEDS[dice.below(SEEDS.len())].chars().collect();
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

#[test]
fn parsers_stand_mutated_text() {
    let seed = 0x1ac0_7a5e_ed00_0001;
    println!("seed {seed:#x}");
    let mut dice = Dice(seed);
    for text in SEEDS {
        lacuna_cli::parse_hostile(text);
    }
    for _ in 0..50_000 {
        lacuna_cli::parse_hostile(&mutated(&mut dice));
    }
}
