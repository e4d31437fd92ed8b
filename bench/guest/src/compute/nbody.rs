//! Scalar double arithmetic: planets that attract one another.

use anyhow::Result;

#[derive(Clone, Copy)]
struct Body {
    place: [f64; 3],
    speed: [f64; 3],
    mass: f64,
}

const BODIES: [Body; 5] = [
    body([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 39.47),
    body([4.84, -1.16, -0.10], [0.606, 2.81, -0.02], 0.037),
    body([8.34, 4.12, -0.40], [-1.01, 1.82, 0.008], 0.011),
    body([12.89, -15.11, -0.22], [1.08, 0.868, -0.01], 0.0017),
    body([15.37, -25.91, 0.17], [0.979, 0.594, -0.034], 0.002),
];

const fn body(place: [f64; 3], speed: [f64; 3], mass: f64) -> Body {
    Body { place, speed, mass }
}

/// Steps of a hundredth of a year.
pub fn double(count: u64) -> Result<u64> {
    let mut bodies = std::hint::black_box(BODIES);
    for _ in 0..count {
        attract(&mut bodies);
        for body in &mut bodies {
            for axis in 0..3 {
                body.place[axis] += 0.01 * body.speed[axis];
            }
        }
    }
    let sum: f64 = bodies.iter().flat_map(|b| b.place).sum();
    Ok(sum.to_bits())
}

fn attract(bodies: &mut [Body]) {
    for first in 0..bodies.len() {
        let (head, tail) = bodies.split_at_mut(first + 1);
        let a = &mut head[first];
        for b in tail {
            let away = [0, 1, 2].map(|axis| a.place[axis] - b.place[axis]);
            let square: f64 = away.iter().map(|d| d * d).sum();
            let strength = 0.01 / (square * square.sqrt());
            for (axis, d) in away.iter().enumerate() {
                a.speed[axis] -= d * b.mass * strength;
                b.speed[axis] += d * a.mass * strength;
            }
        }
    }
}
