//! Numbers that look random and are the same on every run (xorshift64*, Vigna 2016).

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

/// English-like text: words of a small vocabulary, most of them often and some of them seldom, in lines.
pub fn text(length: usize) -> Vec<u8> {
    let mut random = Random::new(7);
    let vocabulary: Vec<Vec<u8>> = (0..2000).map(|_| word(&mut random)).collect();
    let mut text = Vec::with_capacity(length + 16);
    let mut line = 0;
    while text.len() < length {
        let rank = random.below(2000) * random.below(2000) / 2000;
        text.extend(&vocabulary[rank as usize]);
        line += 1;
        text.push(if line % 12 == 0 { b'\n' } else { b' ' });
    }
    text.truncate(length);
    text
}

fn word(random: &mut Random) -> Vec<u8> {
    let letters = 2 + random.below(8);
    (0..letters)
        .map(|_| b'a' + (random.below(26) * random.below(26) / 26) as u8)
        .collect()
}
