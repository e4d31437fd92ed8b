//! The Internet checksum (RFC 1071), not yet complemented.

use std::net::Ipv4Addr;

/// The sum over `data`, as if it began at an even offset.
pub fn data(data: &[u8]) -> u16 {
    // The sum does not depend on the byte order it is made in, so whole words are added as the processor has them; four
    // sums side by side let the compiler use its vectors.
    let (chunks, rest) = data.as_chunks::<16>();
    let mut sums = [0u64; 4];
    for chunk in chunks {
        for (n, sum) in sums.iter_mut().enumerate() {
            let word = [0, 1, 2, 3].map(|b| chunk[4 * n + b]);
            *sum += u64::from(u32::from_ne_bytes(word));
        }
    }
    let (pairs, last) = rest.as_chunks::<2>();
    let pairs = pairs
        .iter()
        .map(|pair| u64::from(u16::from_ne_bytes(*pair)));
    let last = last
        .first()
        .map_or(0, |byte| u64::from(u16::from_ne_bytes([*byte, 0])));
    let total = sums.iter().sum::<u64>() + pairs.sum::<u64>() + last;
    fold(total).to_be()
}

/// The sum of sums.
pub fn combine(sums: &[u16]) -> u16 {
    fold(sums.iter().map(|sum| u64::from(*sum)).sum())
}

/// The sum over parts that follow one another, whatever their lengths.
pub fn parts(parts: &[&[u8]]) -> u16 {
    let (mut total, mut odd) = (0, false);
    for part in parts {
        let sum = data(part);
        total = combine(&[total, if odd { sum.swap_bytes() } else { sum }]);
        odd ^= part.len() % 2 == 1;
    }
    total
}

/// The sum over the pseudo header of IPv4.
pub fn pseudo(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, len: usize) -> u16 {
    let addresses = [data(&source.octets()), data(&destination.octets())];
    combine(&[addresses[0], addresses[1], protocol.into(), len as u16])
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plainly(data: &[u8]) -> u16 {
        let pair = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        fold(data.chunks(2).map(pair).sum())
    }

    #[test]
    fn it_is_the_sum_of_big_endian_words_whatever_the_cuts() {
        let data: Vec<u8> = (0..1000u32).map(|n| ((n * n) >> 3) as u8 | 1).collect();
        for len in (0..70).chain([999, 1000]) {
            assert_eq!(super::data(&data[..len]), plainly(&data[..len]), "{len}");
        }
        for cut in [0, 1, 2, 499, 500, 999, 1000] {
            let (a, b) = data.split_at(cut);
            let (b, c) = b.split_at(b.len() / 3);
            assert_eq!(parts(&[a, b, c]), plainly(&data), "{cut}");
        }
    }

    #[test]
    fn the_example_of_the_rfc() {
        let words = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(data(&words), 0xddf2);
    }
}
