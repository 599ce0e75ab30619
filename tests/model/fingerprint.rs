//! Fingerprints of states: 128 bits, so that two of ten million states collide with a probability below 1e-24.

/// Two independent multiply-rotate lanes.
pub struct Mixer(u64, u64);

impl Default for Mixer {
    fn default() -> Self {
        Self(0x243F_6A88_85A3_08D3, 0x1319_8A2E_0370_7344)
    }
}

impl Mixer {
    pub fn add(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
        self.1 = (self.1 ^ value.rotate_left(32)).wrapping_mul(0xC2B2_AE3D_27D4_EB4F).rotate_left(31);
    }

    pub fn finish(mut self) -> u128 {
        for _ in 0..3 {
            let (a, b) = (self.0, self.1);
            self.add(a ^ a >> 32);
            self.add(b ^ b >> 29);
        }
        u128::from(self.0) << 64 | u128::from(self.1)
    }
}
